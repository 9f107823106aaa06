"use strict";
(() => {
  const given = JSON.parse(document.getElementById("specs").textContent);
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = window.localStorage.getItem("trimoe-theme"); } catch { /* a file opened from disk may have no storage */ }
  const views = new Map();
  let width = window.innerWidth;
  const theme = () => (chosen === "dark" || chosen === "light" ? chosen : system.matches ? "dark" : "light");

  async function draw(place) {
    views.get(place)?.finalize();
    const name = place.dataset.chart;
    if (place.dataset.wide) place.style.minWidth = place.dataset.wide + "px";
    const look = given.themes[theme()];
    const drawn = (columns) => window.vegaEmbed(place, given.specs[name], {
      mode: "vega-lite", renderer: "dense" in place.dataset ? "canvas" : "svg", ast: true, config: { ...look, legend: { ...look.legend, columns } }, downloadFileName: name,
      tooltip: { theme: theme() },
      actions: { export: true, source: false, compiled: false, editor: false },
    });
    // a legend stands over the plot, is as wide as its entries, and Vega does not wrap it by itself
    const fit = (pixels) => Math.max(1, Math.floor(pixels / given.entry));
    const columns = fit(place.clientWidth);
    let made = await drawn(columns);
    const fewer = fit(made.view.width());
    if (fewer < columns) {
      made.finalize();
      made = await drawn(fewer);
    }
    views.set(place, made);
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
  let waiting = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return; // a phone's address bar came or went
    width = window.innerWidth;
    window.clearTimeout(waiting);
    waiting = window.setTimeout(show, 150);
  });
  show();
})();
