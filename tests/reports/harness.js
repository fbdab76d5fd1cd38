// Loads pages into frames of given widths, as a phone or a desk would show them, uses them, and writes what it saw as JSON.
"use strict";
const cases = JSON.parse(document.getElementById("cases").textContent);
const overlap = (a, b) => a.left < b.right - 0.5 && b.left < a.right - 0.5 && a.top < b.bottom - 0.5 && b.top < a.bottom - 0.5;

function look(frame) {
  const page = frame.contentDocument;
  const view = frame.contentWindow;
  const wide = (element) => element.getBoundingClientRect().width > 0;
  const seen = {
    title: page.title,
    width: view.innerWidth,
    figures: [...page.querySelectorAll("figure")].map((figure) => figure.id.replace("figure-", "")),
    plots: page.querySelectorAll(".plot").length,
    overflow: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    small: [],
    clashes: [],
    outside: [],
    flat: [],
    tips: 0,
  };
  const texts = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.textContent.trim() || !wide(element) || element.closest("script, style, .cloud")) continue;
    const size = parseFloat(view.getComputedStyle(element).fontSize);
    if (size < 12) seen.small.push([element.className.baseVal ?? element.className, size, texts.currentNode.textContent]);
  }
  for (const plot of page.querySelectorAll(".plot")) {
    const box = plot.getBoundingClientRect();
    const ticks = [...plot.querySelectorAll(".tick.x")].map((tick) => tick.getBoundingClientRect());
    ticks.forEach((tick, i) => {
      if (i && overlap(tick, ticks[i - 1])) seen.clashes.push(plot.dataset.chart);
    });
    for (const tick of plot.querySelectorAll(".tick")) {
      const { left, right } = tick.getBoundingClientRect();
      if (left < 0 || right > view.innerWidth) seen.outside.push([plot.dataset.chart, tick.textContent]);
    }
    const drawn = [...plot.querySelectorAll("path, use, rect")].filter(wide);
    if (!drawn.length || box.height < 150) seen.flat.push(plot.dataset.chart);
    plot.dispatchEvent(
      new view.PointerEvent("pointermove", { clientX: box.left + box.width * 0.6, clientY: box.top + 20, bubbles: true }),
    );
    const tip = page.getElementById("tip");
    const at = tip.getBoundingClientRect();
    if (!tip.hidden && tip.textContent && at.left >= 0 && at.right <= view.innerWidth) seen.tips += 1;
    plot.dispatchEvent(new view.PointerEvent("pointerleave", { bubbles: true }));
  }
  for (const details of page.querySelectorAll("details")) details.open = true;
  for (const button of page.querySelectorAll("details button")) button.click();
  seen.rows = page.querySelectorAll("details.table tbody tr").length;
  seen.overflowOpen = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  return seen;
}

async function main() {
  const found = [];
  for (const { name, url, width } of cases) {
    const frame = document.createElement("iframe");
    frame.width = width;
    frame.height = 900;
    frame.src = url;
    await new Promise((done) => {
      frame.addEventListener("load", done);
      document.body.append(frame);
    });
    found.push({ name, ...look(frame) });
    frame.remove();
  }
  document.getElementById("found").textContent = JSON.stringify(found);
}
main().catch((error) => (document.getElementById("found").textContent = JSON.stringify(String(error))));
