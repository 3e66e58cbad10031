"use strict";
// Sorting by a click on a heading, and the filter above the table of prompts.
const number = (text) => {
  const found = text.replace("\u2212", "-").match(/^[+\u00b1]?(-?[\d.]+)/);
  return found ? parseFloat(found[1]) : NaN;
};
for (const table of document.querySelectorAll("table.sortable")) {
  const buttons = [...table.querySelectorAll("thead button")];
  buttons.forEach((button, column) => button.addEventListener("click", () => {
    const first = isNaN(number(table.tBodies[0].rows[0].cells[column].textContent.trim())) ? 1 : -1;
    const order = button.dataset.order ? -button.dataset.order : first; // numbers: highest first
    buttons.forEach((other) => { delete other.dataset.order; other.parentElement.removeAttribute("aria-sort"); });
    button.dataset.order = order;
    button.parentElement.setAttribute("aria-sort", order > 0 ? "ascending" : "descending");
    const body = table.tBodies[0];
    const text = (row) => row.cells[column].textContent.trim();
    const rows = [...body.rows].sort((one, other) => {
      const a = text(one), b = text(other);
      if (!a || !b) return !a - !b; // what is not there stays below
      const x = number(a), y = number(b);
      return order * (isNaN(x) || isNaN(y) ? a.localeCompare(b) : x - y);
    });
    body.append(...rows);
  }));
}
for (const input of document.querySelectorAll("input[data-filter]")) {
  const rows = [...document.getElementById(input.dataset.filter).tBodies[0].rows];
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = (row.cells[0].textContent + " " + row.cells[1].textContent).toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
}
