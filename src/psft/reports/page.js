"use strict";
// Reads values off the charts under the pointer or the arrow keys, fills in long tables when they are opened, and reads
// the page again while the run goes on. The page is complete without it.
(() => {
  const data = JSON.parse(document.getElementById("psft-data").textContent);
  const tip = document.getElementById("tip");

  const chartOf = (name) => {
    const [figure, place] = name.split(":");
    return data.figures[figure].charts[Number(place)];
  };
  const shown = (value, form) => {
    if (value === null || value === undefined) return "no value";
    if (form === "percent") return `${Number((value * 100).toPrecision(4))}%`;
    return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(5)));
  };
  const place = (chart, line, i) => {
    if (line.notes) return line.notes[i];
    if (chart.categories.length) return chart.categories[line.x[i]];
    return `${chart.x_label === "optimizer step" ? "step" : chart.x_label} ${shown(line.x[i], "number")}`;
  };

  // Index of the point nearest to x, in a list that rises.
  const nearest = (list, x) => {
    let low = 0;
    let high = list.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (list[middle] < x) low = middle;
      else high = middle;
    }
    return Math.abs(list[low] - x) <= Math.abs(list[high] - x) ? low : high;
  };
  const nearestInPlane = (chart, line, x, y) => {
    const width = chart.x_ends[1] - chart.x_ends[0];
    const height = chart.y_ends[1] - chart.y_ends[0];
    let best = 0;
    let least = Infinity;
    line.x.forEach((a, i) => {
      const distance = Math.hypot((a - x) / width, (line.y[i] - y) / height);
      if (distance < least) [best, least] = [i, distance];
    });
    return best;
  };

  const row = (style, text) => {
    const p = document.createElement("p");
    if (style !== null) {
      const key = document.createElement("span");
      key.className = `key c${style % 8}`;
      p.append(key);
    }
    p.append(text);
    return p;
  };
  const show = (plot, shareX, shareY) => {
    const chart = chartOf(plot.dataset.chart);
    const x = chart.x_ends[0] + shareX * (chart.x_ends[1] - chart.x_ends[0]);
    const y = chart.y_ends[1] - shareY * (chart.y_ends[1] - chart.y_ends[0]);
    const lines = chart.lines.slice(0, 12);
    const found = lines.map((line) => (chart.kind === "path" ? nearestInPlane(chart, line, x, y) : nearest(line.x, x)));
    tip.replaceChildren();
    lines.forEach((line, n) => {
      const i = found[n];
      let text = `${line.label}, ${place(chart, line, i)}: ${shown(line.y[i], chart.y_form)}`;
      if (line.error && line.error[i] !== null) text += ` \u00b1 ${shown(line.error[i], chart.y_form)}`;
      if (line.low) text += ` (${shown(line.low[i], chart.y_form)} to ${shown(line.high[i], chart.y_form)})`;
      tip.append(row(line.style, text));
    });
    if (chart.lines.length > lines.length) tip.append(row(null, `and ${chart.lines.length - lines.length} more lines`));
    const box = plot.getBoundingClientRect();
    const cross = plot.querySelector(".cross");
    for (const end of ["x1", "x2"]) cross.setAttribute(end, `${shareX * 100}%`);
    cross.setAttribute("visibility", "visible");
    tip.hidden = false;
    const left = box.left + shareX * box.width + 14;
    const isTooFar = left + tip.offsetWidth > document.documentElement.clientWidth - 8;
    tip.style.left = `${Math.max(8, isTooFar ? left - tip.offsetWidth - 28 : left)}px`;
    tip.style.top = `${Math.max(8, Math.min(box.top + 8, window.innerHeight - tip.offsetHeight - 8))}px`;
  };
  const hide = (plot) => {
    tip.hidden = true;
    plot.querySelector(".cross").setAttribute("visibility", "hidden");
  };
  const within = (share) => Math.min(1, Math.max(0, share));

  for (const plot of document.querySelectorAll(".plot")) {
    let at = 0.5;
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      at = within((event.clientX - box.left) / box.width);
      show(plot, at, within((event.clientY - box.top) / box.height));
    });
    plot.addEventListener("pointerleave", () => hide(plot));
    plot.addEventListener("blur", () => hide(plot));
    plot.addEventListener("keydown", (event) => {
      if (event.key === "Escape") hide(plot);
      if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
      event.preventDefault();
      at = within(at + (event.key === "ArrowLeft" ? -0.02 : 0.02));
      show(plot, at, 0.5);
    });
  }

  const cell = (tag, text) => {
    const made = document.createElement(tag);
    made.textContent = text;
    return made;
  };
  const fill = (details) => {
    const chart = chartOf(details.dataset.chart);
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const name of ["line", chart.x_label, chart.y_label]) head.append(cell("th", name));
    const body = table.createTBody();
    for (const line of chart.lines)
      line.x.forEach((_, i) => {
        const tr = body.insertRow();
        tr.append(cell("th", line.label), cell("td", place(chart, line, i)), cell("td", shown(line.y[i], chart.y_form)));
      });
    details.querySelector(".scroll").append(table);
  };
  for (const details of document.querySelectorAll("details[data-long]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Every plotted point";
    button.addEventListener("click", () => {
      fill(details);
      button.remove();
    });
    details.append(button);
  }

  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details.run")) details.open = true;
  });
  if (data.refresh_s) setTimeout(() => location.reload(), data.refresh_s * 1000);
})();
