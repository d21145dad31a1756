"use strict";
// Draws the charts anew, as wide as the window is, as drawing.py has drawn them before: with values
// under the pointer, zoom, other axes. Nothing here is needed to read the page.
(() => {
const LEFT = 56, EDGE = 14, TOP = 10, COLORS = 8, EARLY = 0.05;
const data = JSON.parse(document.getElementById("data").textContent);
const controls = document.getElementById("controls");
const figures = [...document.querySelectorAll("figure.chart")].map(
  (element, i) => ({ element, chart: data.charts[i], zoom: null }));
const escaped = text => String(text).replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);
const colour = line => line.look === "chance" ? "chance" : `k${line.number % COLORS}`;
const least = values => values.reduce((a, b) => Math.min(a, b), Infinity);
const most = values => values.reduce((a, b) => Math.max(a, b), -Infinity);

// ---- numbers

function short(value, digits = 4) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= size * 0.99995) return Number((value / size).toPrecision(digits)) + unit;
  const rounded = Number(value.toPrecision(digits));
  return rounded && Math.abs(rounded) < 1e-4 ? rounded.toExponential() : String(rounded);
}

function ticks(low, high, log, wanted = 5) {
  if (log && high / low > 4) {
    const marks = [], digits = high / low < 30 ? [1, 2, 3, 5, 7] : [1, 3];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
      for (const digit of digits) marks.push(Number(`${digit}e${power}`));
    const inside = marks.filter(mark => low <= mark && mark <= high);
    const step = 1 + Math.floor(inside.length / 10);
    return inside.filter((_, i) => i % step === 0);
  }
  const unit = 10 ** Math.floor(Math.log10(((high - low) || 1) / 4)), marks = [];
  const step = [1, 2, 2.5, 5, 10, 20].map(m => unit * m).find(s => (high - low) / s <= wanted);
  for (let i = Math.ceil(low / step); i <= high / step; i++) marks.push(i * step);
  return marks;
}

// the running mean of curves.smoothed
function smoothed(values, share) {
  const reach = Math.round(values.length * share);
  return values.map((_, i) => {
    const back = Math.min(reach, i), ahead = Math.min(back, values.length - 1 - i);
    let sum = 0, weights = 0;
    for (let d = -back; d <= ahead; d++) {
      const weight = 1 - Math.abs(d) / (back + 1);
      sum += weight * values[i + d];
      weights += weight;
    }
    return sum / weights;
  });
}

// ---- one chart

function axisOf(chart) {
  const asked = controls.elements.x.value;
  return chart.axis === "step" && chart.lines.every(line => line.x[asked]) ? asked : "step";
}

function linesOf(chart, axis) {
  const lines = [];
  for (const line of chart.lines) {
    lines.push({ ...line, at: line.x[axis] });
    if (line.look === "pale") lines.push({ ...line, look: "strong", at: line.x[axis], low: null,
      high: null, y: smoothed(line.y, Number(controls.elements.smooth.value)) });
  }
  return lines;
}

function rangeOf(figure, lines, begin, end) {
  const { chart, zoom } = figure, whole = controls.elements.whole.checked;
  const visible = (line, from) => line.at.map((x, i) => i).filter(i =>
    line.at[i] >= from && line.at[i] <= end);
  const values = from => lines.flatMap(line => visible(line, from).flatMap(i =>
    line.low ? [line.low[i], line.high[i]] : [line.y[i]]));
  const later = chart.fit && !zoom && !whole ? values(begin + EARLY * (end - begin) + 1e-12) : [];
  const chosen = later.length > 2 ? later : values(begin);
  let low = least(chosen), high = most(chosen);
  if (!chosen.length) return { low: 0, high: 1, log: false };
  if ((chart.log || controls.elements.log.checked) && low > 0) {
    const room = Math.max((high / low) ** 0.05, 1.001);
    return { low: low / room, high: high * room, log: true };
  }
  if (chart.zero && !zoom) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
  const room = 0.06 * (high - low) || 0.06 * Math.abs(high) || 1;
  return { low: low - (low ? room : 0), high: high + room, log: false };
}

function lineAsSvg(line, across, down) {
  const at = values => line.at.map((x, i) => `${across(x).toFixed(1)},${down(values[i]).toFixed(1)}`);
  const mean = at(line.y), dots = line.look === "dots";
  const skip = dots && mean.length > 1 && line.x.step[0] === 0 ? 1 : 0;
  let drawn = `<path d="M${mean.slice(skip).join(" ")}h0"/>`;
  if (line.low) {
    const low = at(line.low), high = at(line.high);
    drawn += dots ? low.map((a, i) => `<path class="range" d="M${a} ${high[i]}"/>`).join("")
      : `<polygon points="${[...high, ...low.reverse()].join(" ")}"/>`;
  }
  if (dots) drawn += mean.map(point => point.split(",")).map(
    ([x, y]) => `<circle r="3.5" cx="${x}" cy="${y}"/>`).join("");
  const broken = line.number >= COLORS ? " broken" : "";
  return `<g class="curve ${line.look}${broken} k${line.number % COLORS}">${drawn}</g>`;
}

function draw(figure) {
  const { element, chart } = figure, width = element.clientWidth;
  if (!width) return; // it lies in a fold
  const height = chart.wide && width > 600 ? 320 : 200, bottom = TOP + height, right = width - EDGE;
  const axis = axisOf(chart), lines = linesOf(chart, axis), all = lines.flatMap(line => line.at);
  if (figure.zoom && figure.zoom.axis !== axis) figure.zoom = null;
  const [begin, end] = figure.zoom ? figure.zoom.range
    : [chart.left === null ? least(all) : chart.left, most(all)];
  const { low, high, log } = rangeOf(figure, lines, begin, end);
  const across = x => LEFT + (right - LEFT) * (x - begin) / ((end - begin) || 1);
  const down = y => TOP + height * (1 - (log ? Math.log(y / low) / Math.log(high / low)
    : (y - low) / (high - low)));
  const grid = ticks(low, high, log).map(y => `<path class="rule" d="M${LEFT} ${down(y).toFixed(1)}`
    + `H${right}"/><text class="y" x="${LEFT - 8}" y="${down(y) + 4}">${short(y)}</text>`);
  const marks = ticks(begin, end, false, Math.max(3, width / 110)).map(x =>
    `<text class="x" x="${across(x).toFixed(1)}" y="${bottom + 18}">${short(x)}</text>`);
  const name = { step: "step", hours: "hours of training", tokens: "tokens" };
  const label = chart.axis === "step" ? name[axis] : chart.axis;
  element.querySelector("svg").outerHTML = `<svg viewBox="0 0 ${width} ${bottom + 40}" role="img"`
    + ` tabindex="0" aria-label="${escaped(chart.title)}">${grid.join("")}${marks.join("")}`
    + `<text class="y" x="${right}" y="${bottom + 36}">${escaped(label)}</text>`
    + `<svg x="${figure.zoom ? LEFT : 0}" y="${TOP}" width="${width - (figure.zoom ? LEFT : 0)}"`
    + ` height="${height}" viewBox="${figure.zoom ? LEFT : 0} ${TOP} ${width - (figure.zoom ? LEFT : 0)}`
    + ` ${height}">${lines.map(line => lineAsSvg(line, across, down)).join("")}</svg>`
    + `<g class="above"></g></svg>`;
  for (const cut of element.querySelectorAll(".cut"))
    cut.hidden = figure.zoom !== null || controls.elements.whole.checked;
  Object.assign(figure, { width, bottom, right, axis, lines, begin, end, across, down, label });
  listen(figure, element.querySelector("svg"));
}

// ---- the pointer and the keys

function listen(figure, svg) {
  const xOf = event => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * figure.width - LEFT) / (figure.right - LEFT);
    return figure.begin + Math.min(Math.max(share, 0), 1) * (figure.end - figure.begin);
  };
  let from = null; // where a drag began
  svg.addEventListener("pointerdown", event => {
    if (event.pointerType !== "touch" && event.button === 0) {
      from = xOf(event);
      svg.setPointerCapture(event.pointerId); // a drag may end beside the chart
    }
    show(figure, xOf(event));
  });
  svg.addEventListener("pointermove", event => show(figure, xOf(event), from));
  svg.addEventListener("pointerleave", () => { from = null; hide(figure); });
  svg.addEventListener("pointerup", event => {
    const range = [from, xOf(event)].sort((a, b) => a - b);
    const far = from !== null && figure.across(range[1]) - figure.across(range[0]) > 6;
    from = null;
    if (far) zoom(figure, { axis: figure.axis, range });
  });
  svg.addEventListener("dblclick", () => zoom(figure, null));
  svg.addEventListener("keydown", event => {
    const steps = figure.lines.reduce((a, b) => a.at.length >= b.at.length ? a : b).at
      .filter(x => x >= figure.begin && x <= figure.end);
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") zoom(figure, null);
    if (!way || !steps.length) return;
    event.preventDefault();
    const now = figure.at === undefined ? -1 : nearest(steps, figure.at);
    show(figure, steps[Math.min(Math.max(now + way, 0), steps.length - 1)]);
  });
  svg.addEventListener("blur", () => hide(figure));
}

function zoom(figure, range) {
  figure.zoom = range;
  hide(figure);
  draw(figure);
}

function nearest(values, x) {
  let best = 0;
  values.forEach((value, i) => { if (Math.abs(value - x) < Math.abs(values[best] - x)) best = i; });
  return best;
}

function show(figure, x, from = null) {
  hide(figure);
  const { element, across, down, lines } = figure;
  const longest = lines.reduce((a, b) => a.at.length >= b.at.length ? a : b);
  const at = longest.at[nearest(longest.at, x)], rows = [];
  let above = `<path class="cross" d="M${across(at).toFixed(1)} ${TOP}V${figure.bottom}"/>`;
  if (from !== null) {
    const [a, b] = [across(from), across(x)].sort((one, two) => one - two);
    above += `<rect class="chosen" x="${a}" y="${TOP}" width="${b - a}" height="${figure.bottom - TOP}"/>`;
  }
  for (const line of lines) {
    const i = nearest(line.at, at), y = down(line.y[i]);
    if (!["pale", "chance"].includes(line.look) && y >= TOP)
      above += `<g class="curve k${line.number % COLORS}"><circle r="4" cx="${across(line.at[i])}" cy="${y}"/></g>`;
    const interval = line.low ? ` (${short(line.low[i])} to ${short(line.high[i])})` : "";
    const behind = line.look === "pale" ? ", as logged" : "";
    const where = line.at[i] === at || line.look === "chance" ? "" : ` at ${short(line.at[i])}`;
    rows.push(`<div><span class="${colour(line)}">●</span> ${escaped(line.label)}${behind}${where}`
      + `<b>${short(line.y[i], 5)}${interval}</b></div>`);
  }
  element.querySelector(".above").innerHTML = above;
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.innerHTML = `<div>${escaped(figure.label)} ${short(at, 6)}</div>${rows.join("")}`;
  element.append(tip);
  const left = across(at) + 14, space = figure.width - tip.offsetWidth;
  tip.style.left = `${left < space ? left : Math.max(0, Math.min(across(at) - tip.offsetWidth - 14, space))}px`;
  tip.style.top = `${element.querySelector("figcaption").offsetHeight + 22}px`;
  figure.at = at;
}

function hide(figure) {
  figure.element.querySelector(".tip")?.remove();
  const above = figure.element.querySelector(".above");
  if (above) above.innerHTML = "";
  figure.at = undefined;
}

// ---- the page

const redraw = () => figures.forEach(draw);
const folds = [...document.querySelectorAll("details")];
const opened = folds.map(fold => fold.open); // as the page was written
// a fold is known by its title, of several with one title also by their number
const names = folds.map((fold, i) => {
  const title = fold.querySelector("summary").textContent;
  return `${title} ${folds.slice(0, i).filter(f => f.querySelector("summary").textContent === title).length}`;
});
const place = `plainllama ${location.pathname}`;

function remember() {
  const { x, smooth, log, whole } = controls.elements, changed = {};
  folds.forEach((fold, i) => { if (fold.open !== opened[i]) changed[names[i]] = fold.open; });
  const zooms = figures.map(figure => figure.zoom);
  sessionStorage.setItem(place, JSON.stringify({ scroll: scrollY, changed, zooms, x: x.value,
    smooth: smooth.value, log: log.checked, whole: whole.checked }));
}

function recall() {
  const kept = JSON.parse(sessionStorage.getItem(place) ?? "null");
  if (!kept) return;
  const { x, smooth, log, whole } = controls.elements;
  [x.value, smooth.value, log.checked, whole.checked] = [kept.x, kept.smooth, kept.log, kept.whole];
  figures.forEach((figure, i) => { figure.zoom = kept.zooms[i] ?? null; });
  folds.forEach((fold, i) => { fold.open = kept.changed[names[i]] ?? fold.open; });
  redraw();
  scrollTo(0, kept.scroll);
}

function refresh() {
  const busy = document.hidden || document.querySelector(".tip") || String(getSelection());
  if (busy) setTimeout(refresh, 1000); // not under the reader's hand
  else location.reload();
}

if (controls) {
  controls.hidden = false;
  for (const input of controls.elements.x) input.disabled = input.value !== "step"
    && !data.charts.some(chart => chart.axis === "step" && chart.lines.every(l => l.x[input.value]));
  controls.addEventListener("input", redraw);
  controls.addEventListener("submit", event => event.preventDefault());
  history.scrollRestoration = "manual";
  folds.forEach(fold => fold.addEventListener("toggle", redraw));
  addEventListener("resize", redraw);
  addEventListener("pagehide", remember);
  addEventListener("beforeprint", () => folds.forEach(fold => { fold.open = true; }));
  redraw();
  recall();
  if (data.every) setTimeout(refresh, 1000 * data.every);
}
})();
