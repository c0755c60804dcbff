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
const marks = [...document.querySelectorAll(".correct")];
if (marks.length) {
  const chosen = new Map();  // name in corrections.csv -> class, "" to exclude the example
  const cells = new Map([...document.querySelectorAll("#class-names option")].map((o) => [o.value, o.dataset.cell]));
  const bar = document.getElementById("corrections");
  const show = () => {
    for (const mark of marks) {
      const [select, input] = mark.children, value = chosen.get(mark.dataset.file);
      mark.classList.toggle("chosen", value !== undefined);
      const suggested = value && value === mark.dataset.suggestion;
      if (value === undefined && select.value === "other") continue;  // its class is being typed
      select.value = value === undefined ? "" : value === "" ? "exclude" : suggested ? "suggested" : "other";
      input.hidden = select.value !== "other";
      if (!input.hidden) input.value = value;
    }
    const excluded = [...chosen.values()].filter((value) => value === "").length;
    bar.hidden = !chosen.size;
    bar.firstChild.textContent = `${excluded} excluded, ${chosen.size - excluded} relabelled`;
  };
  for (const mark of marks) {
    const select = document.createElement("select"), input = document.createElement("input");
    const {file, suggestion} = mark.dataset;
    select.setAttribute("aria-label", `correct ${file}`);
    const options = {"": "correct?", exclude: "exclude", suggested: `relabel to ${suggestion}`, other: "relabel to another class"};
    if (!suggestion) delete options.suggested;
    for (const [value, text] of Object.entries(options)) select.append(new Option(text, value));
    input.setAttribute("list", "class-names");
    input.setAttribute("aria-label", `class of ${file}`);
    input.placeholder = "class";
    input.hidden = true;
    mark.append(select, input);
    select.addEventListener("change", () => {
      chosen.delete(file);
      if (select.value === "exclude") chosen.set(file, "");
      if (select.value === "suggested") chosen.set(file, suggestion);
      input.hidden = select.value !== "other";
      input.value = "";
      show();
      if (!input.hidden) input.focus();
    });
    input.addEventListener("change", () => {
      const known = cells.has(input.value);
      input.setCustomValidity(known || !input.value ? "" : "This is not one of the classes.");
      if (known) chosen.set(file, input.value); else chosen.delete(file);
      show();
    });
  }
  bar.addEventListener("click", (event) => {
    const does = event.target.dataset.does;
    if (does === "clear") {
      chosen.clear();
      for (const mark of marks) mark.firstChild.value = "";
      show();
    } else if (does === "save") {
      const quote = (cell) => `"${cell.replaceAll('"', '""')}"`;
      const rows = [...chosen].map(([file, name]) =>
        [file, name ? "relabel" : "exclude", name && cells.get(name)].map(quote).join(","));
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([["file,action,class", ...rows, ""].join("\n")], {type: "text/csv"}));
      link.download = "corrections.csv";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    }
  });
}
