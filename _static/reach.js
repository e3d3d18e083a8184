/* What scrolls sideways can be reached by keyboard: a box that is wider than
   the screen becomes a tab stop, and stops being one when it fits. */
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const boxes = document.querySelectorAll(
    "main .display, main pre, main .pst-scrollable-table-container," +
      " main .output.text_html"
  );
  const look = (entries) => {
    // Read all, then write all: one layout, not one a box.
    const wide = entries.map(({ target: t }) => t.scrollWidth > t.clientWidth);
    entries.forEach(({ target: t }, k) => {
      if (wide[k]) {
        t.tabIndex = 0;
        t.dataset.wide = "";
      } else {
        t.removeAttribute("tabindex");
        delete t.dataset.wide;
      }
    });
  };
  const observer = new ResizeObserver(look);
  boxes.forEach((box) => observer.observe(box));
});
