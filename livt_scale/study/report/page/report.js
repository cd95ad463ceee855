"use strict";
// Draws the plots, keeps their colours those of the page (light, dark, print), and sorts the table of runs.
(() => {
  const items = JSON.parse(document.getElementById("plots").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function colours() {
    return { ink: css("--ink"), soft: css("--soft"), line: css("--line"), grid: css("--grid") };
  }

  function dress(plot, c) {
    for (const place of ["above", "below", "left", "right", "center"]) {
      for (const part of plot[place]) {
        if (part.type === "Legend") part.setv({ label_text_color: c.ink, inactive_fill_color: null });
        else if (part.type === "Grid") { if (part.dimension === 1) part.grid_line_color = c.grid; }
        else if (part.type.endsWith("Axis")) {
          part.setv({ axis_label_text_color: c.soft, major_label_text_color: c.ink, axis_line_color: c.line,
            major_tick_line_color: c.line });
        }
      }
    }
  }

  function dressAll() {
    const c = colours();
    for (const shown of Bokeh.documents) for (const plot of shown.roots()) dress(plot, c);
  }
  const draw = (key) => Bokeh.embed.embed_item(items[key], "plot-" + key);

  // Where one plot cannot be drawn the others still are; the page holds how many were.
  Promise.allSettled(Object.keys(items).map(draw)).then((results) => {
    dressAll();
    for (const result of results) if (result.status === "rejected") console.error(result.reason);
    document.documentElement.dataset.drawn = results.filter((r) => r.status === "fulfilled").length;
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dressAll);
  matchMedia("print").addEventListener("change", dressAll);

  const compare = (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
  };

  function sortBy(head) {
    const table = head.closest("table");
    const column = [...head.parentElement.children].indexOf(head);
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.children) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.children[column].dataset.value ?? row.children[column].textContent.trim();
    const rows = [...table.tBodies[0].rows];
    const missing = rows.filter((row) => value(row) === "");  // last, whichever way
    const sorted = rows.filter((row) => value(row) !== "").sort((a, b) => (up ? 1 : -1) * compare(value(a), value(b)));
    table.tBodies[0].append(...sorted, ...missing);
    document.getElementById("sorted").textContent =
      "Sorted by " + head.textContent.trim() + (up ? ", ascending" : ", descending");
  }

  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => sortBy(button.closest("th")));
  }
})();
