/* The figure of the first page: softmax of three logits at a temperature.
   Without JavaScript the drawing stands as it is in the page. */
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const figure = document.getElementById("softmax-figure");
  if (!figure) return;

  const logits = [1, 2, 3].map((k) => figure.querySelector(`#logit-${k}`));
  const temperature = figure.querySelector("#temperature");
  const said = figure.querySelector("#softmax-said");
  const point = figure.querySelector("#simplex-point");
  const bars = [1, 2, 3].map((k) => figure.querySelector(`#bar-${k}`));
  const values = [1, 2, 3].map((k) => figure.querySelector(`#value-${k}`));

  // Shift, then divide: no temperature overflows.
  function softmax(z, t) {
    const top = Math.max(...z);
    const weights = z.map((v) => Math.exp((v - top) / t));
    const total = weights.reduce((a, b) => a + b, 0);
    return weights.map((w) => w / total);
  }

  function draw() {
    const z = logits.map((input) => Number(input.value));
    const t = 10 ** Number(temperature.value);
    const p = softmax(z, t);
    const entropy = -p.reduce((s, q) => s + (q > 0 ? q * Math.log(q) : 0), 0);

    logits.forEach((input, k) => {
      const shown = z[k].toFixed(1);
      input.setAttribute("aria-valuetext", shown);
      figure.querySelector(`#logit-${k + 1}-shown`).textContent = shown;
    });
    const shown = t.toPrecision(2);
    temperature.setAttribute("aria-valuetext", shown);
    figure.querySelector("#temperature-shown").textContent = shown;

    p.forEach((q, k) => {
      bars[k].setAttribute("y", 150 - 130 * q);
      bars[k].setAttribute("height", 130 * q);
      values[k].setAttribute("y", 145 - 130 * q);
      values[k].textContent = q.toFixed(3);
    });
    // Corners of the triangle: classes 1 and 2 below, class 3 on top.
    point.setAttribute("cx", 210 * p[0] + 350 * p[1] + 280 * p[2]);
    point.setAttribute("cy", 150 * (p[0] + p[1]) + 28.8 * p[2]);

    const best = p.indexOf(Math.max(...p));
    said.textContent =
      `Largest: class ${best + 1} with probability ${p[best].toFixed(3)}. ` +
      `Entropy: ${Math.abs(entropy).toFixed(3)} nats of at most 1.099.`;
    figure.dataset.p = JSON.stringify(p);
  }

  for (const input of [...logits, temperature]) {
    input.disabled = false;
    input.addEventListener("input", draw);
  }
  draw();
});
