"use strict";
(() => {
  const given = JSON.parse(document.getElementById("specs").textContent);
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = window.localStorage.getItem("trimoe-theme"); } catch { /* a file opened from disk may have no storage */ }
  const views = new Map();
  const theme = () => (chosen === "dark" || chosen === "light" ? chosen : system.matches ? "dark" : "light");

  async function draw(place) {
    views.get(place)?.finalize();
    const name = place.dataset.chart;
    if (place.dataset.wide) place.style.minWidth = place.dataset.wide + "px";
    const look = given.themes[theme()];
    const columns = Math.max(1, Math.floor(place.clientWidth / given.entry)); // of the legend: Vega does not wrap it by itself
    views.set(place, await window.vegaEmbed(place, given.specs[name], {
      mode: "vega-lite", renderer: "dense" in place.dataset ? "canvas" : "svg", ast: true, config: { ...look, legend: { ...look.legend, columns } }, downloadFileName: name,
      tooltip: { theme: theme() },
      actions: { export: true, source: false, compiled: false, editor: false },
    }));
  }

  async function show() {
    if (chosen) root.dataset.theme = chosen;
    button.textContent = theme() === "dark" ? "Light mode" : "Dark mode";
    await Promise.all([...document.querySelectorAll("[data-chart]")].map(draw));
    root.dataset.drawn = String(views.size);
  }

  button.hidden = false;
  button.addEventListener("click", () => {
    chosen = theme() === "dark" ? "light" : "dark";
    try { window.localStorage.setItem("trimoe-theme", chosen); } catch { /* then only this page remembers */ }
    show();
  });
  system.addEventListener("change", show);
  window.matchMedia("(max-width: 600px)").addEventListener("change", show);
  show();
})();
