"use strict";
// A search field shows the rows of its table that hold all its words.
for (const field of document.querySelectorAll("input[data-table]")) {
  const rows = [...document.querySelectorAll(`#${field.dataset.table} tbody tr`)];
  const said = field.closest(".control").querySelector("output");
  const search = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    said.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };
  field.addEventListener("input", search);
  field.closest(".control").hidden = false;
  search();
}
// A slider shows one of the frames of its section; its steps say what each is called.
for (const slider of document.querySelectorAll("input[data-steps]")) {
  const steps = JSON.parse(slider.dataset.steps);
  const frames = slider.closest("section").querySelectorAll("[data-frame]");
  const said = slider.closest(".control").querySelector("output");
  const show = () => {
    for (const frame of frames) frame.hidden = frame.dataset.frame !== slider.value;
    said.textContent = steps[slider.value];
    slider.setAttribute("aria-valuetext", steps[slider.value]);
  };
  slider.addEventListener("input", show);
  slider.closest(".control").hidden = false;
  show();
}
