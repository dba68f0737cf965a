"use strict";
// A search field shows the rows of its table that contain all its words.
for (const field of document.querySelectorAll("input[data-table]")) {
  const rows = [...document.querySelectorAll(`#${field.dataset.table} tbody tr`)];
  const output = field.closest(".control").querySelector("output");
  const search = () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
    output.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  };
  field.addEventListener("input", search);
  field.closest(".control").hidden = false;
  search();
}
// A slider shows one of the frames of its section; data-steps has their titles.
for (const slider of document.querySelectorAll("input[data-steps]")) {
  const steps = JSON.parse(slider.dataset.steps);
  const frames = slider.closest("section").querySelectorAll("[data-frame]");
  const output = slider.closest(".control").querySelector("output");
  const show = () => {
    for (const frame of frames) frame.hidden = frame.dataset.frame !== slider.value;
    output.textContent = steps[slider.value];
    slider.setAttribute("aria-valuetext", steps[slider.value]);
  };
  slider.addEventListener("input", show);
  slider.closest(".control").hidden = false;
  show();
}
