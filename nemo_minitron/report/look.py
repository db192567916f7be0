"""How the page looks, in light, in dark, on a phone and on paper, and its one script: zooming charts."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5c6675; --line: #c9cfd8; --paper: #ffffff; --card: #f5f7fa;
  --c1: #2563a8; --c2: #c25a10; --c3: #1a7f52; --c4: #8a3fa0; --good: #1a7f52; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa5b4; --line: #3d4654; --paper: #14181f;
  --card: #1c222b; --c1: #7db4f0; --c2: #f0a060; --c3: #63c99a; --c4: #cf9be0; --good: #63c99a; --bad: #f28b82; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
p, figcaption { margin: .4rem 0; } .soft, figcaption { color: var(--soft); font-size: .88rem;
  overflow-wrap: anywhere; }
code, pre { font: .84rem/1.45 ui-monospace, monospace; } code { overflow-wrap: anywhere; }
pre { margin: .4rem 0; padding: .7rem; background: var(--card); border-radius: 6px; overflow-x: auto;
  white-space: pre-wrap;
  overflow-wrap: anywhere; }
.flow { display: flex; flex-wrap: wrap; gap: .6rem 0; align-items: stretch; padding: 0; margin: .8rem 0;
  list-style: none; }
.flow li { display: flex; align-items: center; }
.flow li + li::before { content: "\\2192"; padding: 0 .5rem; color: var(--soft); font-size: 1.3rem; }
.box { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .8rem;
  min-width: 9rem;
  max-width: 12rem; height: 100%; overflow-wrap: anywhere; }
.box b { display: block; } .box span { display: block; font-size: .85rem; color: var(--soft); }
.box .size { height: .45rem; margin: .45rem 0 .3rem; background: var(--line); border-radius: 3px; overflow: hidden; }
.box .size i { display: block; height: 100%; background: var(--c1); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.answer { min-width: 12rem; }
.answer, .said { white-space: pre-wrap; overflow-wrap: anywhere; font: .84rem/1.45 ui-monospace, monospace; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .6rem; }
.side > div { background: var(--card); border-radius: 6px; padding: .6rem; min-width: 0; }
.said { max-height: 14rem; overflow-y: auto; }
.side h4 { margin: 0 0 .3rem; font-size: .8rem; color: var(--soft); }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--c1); }
figure { margin: .6rem 0 1.2rem; }
.chart { display: block; width: 100%; height: auto; touch-action: pan-y; }
.chart image { image-rendering: pixelated; }
figure { display: grid; grid-template-columns: 1fr auto; gap: 0 .6rem; align-items: start; }
figure .frame { grid-column: 1 / 3; } .zoom { display: flex; gap: .25rem; }
.zoom button { min-width: 2rem; height: 2rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card);
  color: var(--ink); font: inherit; cursor: pointer; }
@media (max-width: 40rem) { body { padding: .8rem; } .flow { flex-direction: column; } .flow li { display: block; }
  .box { max-width: none; } .flow li + li::before { content: "\\2193"; display: block; text-align: center; }
  .frame { overflow-x: auto; }
  .chart { min-width: 34rem; } }
@media print { :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --card: #f3f3f3; --c1: #2563a8;
  --c2: #c25a10;
    --c3: #1a7f52; --c4: #8a3fa0; --good: #1a7f52; --bad: #b3261e; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } .zoom { display: none; }
  .wide, .frame, .said { overflow: visible; max-height: none; }
  .chart { min-width: 0; } figure, .box, .side, tr { break-inside: avoid; } h2, h3 { break-after: avoid; } }
"""

SCRIPT = """
for (const frame of document.querySelectorAll(".frame.zooms")) {
  const chart = frame.querySelector("svg"), whole = chart.getAttribute("viewBox").split(" ").map(Number);
  let view = whole.slice(), held = null;
  const show = () => chart.setAttribute("viewBox", view.join(" "));
  const within = (value, least, most) => Math.min(Math.max(value, least), most);

   const room = i => whole[i] + whole[i + 2] - view[i + 2];
  const keep = () => { for (const i of [0, 1]) view[i] = within(view[i], whole[i], room(i)); };
  const zoom = (factor, x = .5, y = .5) => {
    const scale = within(view[2] / factor, whole[2] / 12, whole[2]) / view[2];
    view[0] += view[2] * (1 - scale) * x; view[1] += view[3] * (1 - scale) * y;
    view[2] *= scale; view[3] *= scale; keep(); show(); };
  const bar = document.createElement("div");
  bar.className = "zoom";
  for (const [sign, label, act] of [["+", "zoom in", () => zoom(1.5)], ["\\u2212", "zoom out", () => zoom(1 / 1.5)],
      ["\\u21ba", "whole chart", () => { view = whole.slice(); show(); }]]) {
    const button = document.createElement("button");
    button.textContent = sign; button.title = label; button.setAttribute("aria-label", label);
    button.onclick = act; bar.append(button);
  }
  frame.parentElement.append(bar);
  const place = event => { const box = chart.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]; };
  chart.addEventListener("wheel", event => { if (!event.ctrlKey && !event.shiftKey) return;
    event.preventDefault(); zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, ...place(event)); }, { passive: false });
  chart.addEventListener("dblclick", event => zoom(2, ...place(event)));
  chart.addEventListener("pointerdown", event => { held = [event.clientX, event.clientY, ...view];
    chart.setPointerCapture(event.pointerId); });
  chart.addEventListener("pointermove", event => { if (!held) return; const box = chart.getBoundingClientRect();
    view[0] = held[2] - (event.clientX - held[0]) / box.width * view[2];
    view[1] = held[3] - (event.clientY - held[1]) / box.height * view[3]; keep(); show(); });
  for (const end of ["pointerup", "pointercancel"]) chart.addEventListener(end, () => { held = null; });
}
"""
