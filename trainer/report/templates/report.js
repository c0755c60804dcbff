"use strict";
for (const head of document.querySelectorAll("table.sorts th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => { const cell = row.cells[column]; return cell.dataset.value ?? cell.textContent; };
    const numeric = head.classList.contains("number");
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => (numeric ? a - b : a.localeCompare(b, undefined, {numeric: true})) * (up ? 1 : -1));
    body.append(...rows.map(([, row]) => row));
  });
}
for (const field of document.querySelectorAll("input.filter")) {
  field.hidden = false;
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase();
    for (const row of field.parentNode.querySelectorAll("tbody tr"))
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  });
}
for (const tabs of document.querySelectorAll(".tabs")) {
  tabs.hidden = false;
  const show = (chosen) => {
    for (const button of tabs.children) {
      button.setAttribute("aria-pressed", button === chosen);
      document.getElementById(button.dataset.shows).hidden = button !== chosen;
    }
  };
  for (const button of tabs.children) button.addEventListener("click", () => show(button));
  show(tabs.children[0]);
}
for (const image of document.querySelectorAll("button.image"))
  image.addEventListener("click", () =>
    image.setAttribute("aria-pressed", image.getAttribute("aria-pressed") !== "true"));
