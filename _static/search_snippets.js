/* What a search result shows of its page: the text of the article, without
   code, buttons and menus. */
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return; // no page of results
  const unsaid =
    ".headerlink, script, style, nav, footer, button, .cell, .eqno";
  const blocks = "p, li, h1, h2, h3, h4, td, th, dt, dd, .display";

  Search.htmlToText = (source, anchor) => {
    const page = new DOMParser().parseFromString(source, "text/html");
    const article = page.querySelector("article") || page.body;
    const part = (anchor && article.querySelector(anchor)) || article;
    part.querySelectorAll(unsaid).forEach((e) => e.remove());
    part.querySelectorAll(blocks).forEach((e) => e.append(" "));
    return part.textContent.replace(/\s+/g, " ").trim();
  };
});
