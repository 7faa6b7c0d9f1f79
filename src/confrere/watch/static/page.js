// Asks for /state.json every two seconds and shows it. Whatever comes from a run goes through textContent.
"use strict";

const EVERY = 2000, PATIENCE = 10000; // milliseconds
const PHASES = {
  waiting: "Waiting for sites or data", describe: "Sites describe their data", train: "Training",
  evaluate: "Evaluating", examine: "Testing the chosen round", controls: "Training the controls",
  stopped: "Stopped", done: "Done", failed: "Failed",
};
const LABELS = ["", "State", "Score, %", "Loss", "Sent", "Received", "Refused or failed"];
const NONE = "\u2013";
const $ = id => document.getElementById(id);
let shown = "", last = null;

function node(tag, text = "", kind = "", ...inner) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  made.append(...inner);
  return made;
}

function drawn(tag, attributes, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

function duration(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

function size(bytes) {
  for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (bytes >= scale) return `${(bytes / scale).toPrecision(3)} ${unit}`;
  return `${bytes} B`;
}

const percent = share => share === null ? NONE : (100 * share).toFixed(1);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function phase(state) {
  if (state.stalled) return [`Stalled: no sign of life for ${duration(state.now - state.updated)}`, "bad"];
  if (state.again) return [`Stopped; continue with: ${state.again}`, "bad"];
  if (state.phase === "failed") return [`Failed${state.error ? `: ${state.error}` : ""}`, "bad"];
  return [PHASES[state.phase], state.phase === "done" ? "good" : ""];
}

function standing(site, now) {
  if (site.refused) return [`refused: ${site.refused}`, "down"];
  if (site.expected) return ["expected", ""];
  if (site.online === false)
    return [site.seen ? `offline, seen ${duration(now - site.seen)} ago` : "offline, never seen", "down"];
  if (site.waiting) return ["waited for", "asked"];
  return site.online ? ["online", "up"] : ["idle", ""];
}

function facts(state) {
  const seconds = state.seconds;
  const mean = seconds.length ? seconds.reduce((a, b) => a + b) / seconds.length : null;
  const told = state.sites.filter(site => site.online !== null && !site.expected);
  const rows = [
    ["Rounds committed", `${state.round} of ${state.rounds}`],
    ["A round takes", mean === null ? NONE : `about ${duration(mean)}`],
    ["Training left", state.eta === null ? NONE : `about ${duration(state.eta)}`],
    ["Bytes moved", size(state.bytes)],
  ];
  if (told.length) rows.splice(1, 0, ["Sites online", `${told.filter(s => s.online).length} of ${told.length}`]);
  return rows.map(([name, value]) => node("div", "", "", node("dt", name), node("dd", value)));
}

function siteRow(site, now) {
  const [words, kind] = standing(site, now);
  const refusals = Object.entries(site.refusals).map(([code, count]) => `${code} (${count})`).join(", ");
  const head = node("th", site.name);
  head.scope = "row";
  head.setAttribute("role", "rowheader");
  const cells = [
    node("td", words, `state ${kind}`), node("td", percent(site.score), "number"),
    node("td", site.loss === null ? NONE : site.loss.toFixed(3), "number"),
    node("td", size(site.sent_bytes), "number"), node("td", size(site.received_bytes), "number"), node("td", refusals),
  ];
  cells.forEach((cell, index) => {
    cell.setAttribute("role", "cell");
    if (index) cell.dataset.label = LABELS[index + 1];
  });
  const row = node("tr", "", "", head, ...cells);
  row.setAttribute("role", "row");
  return row;
}

function failure(one) {
  const who = one.site ? one.site : "the server";
  const code = one.code ? [" ", node("code", one.code)] : [];
  const head = node("div", "", "", `Round ${one.round}: `, node("b", who), ...code);
  return node("li", "", "", head, node("p", one.reason));
}

function curve(state) {
  const picture = $("curve"), points = state.scores.filter(score => score.mean !== null);
  picture.replaceChildren();
  $("drawing").hidden = !points.length;
  if (!points.length) {
    $("curve-text").textContent = "No round was judged yet.";
    return;
  }
  const first = points[0], end = points[points.length - 1];
  $("curve-text").textContent = points.length === 1
    ? `Mean ${percent(end.mean)} % after ${plural(end.round, "round")}.`
    : `Mean ${percent(first.mean)} % after round ${first.round}, ${percent(end.mean)} % after round ${end.round}.`;
  const width = picture.clientWidth, height = picture.clientHeight;
  const box = {left: 34, right: width - 10, top: 8, bottom: height - 22};
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const values = points.flatMap(score => [score.mean, ...Object.values(score.sites)]);
  const low = Math.floor(10 * Math.min(...values)) / 10;
  const high = Math.max(low + 0.1, Math.ceil(10 * Math.max(...values)) / 10);
  const until = Math.max(state.rounds, end.round, 2);
  const x = round => box.left + (round - 1) / (until - 1) * (box.right - box.left);
  const y = value => box.bottom - (value - low) / (high - low) * (box.bottom - box.top);
  axes(picture, box, x, y, low, high, until);
  const line = (pairs, kind) => pairs.length > 1 && picture.append(drawn("polyline",
    {class: kind, points: pairs.map(([round, value]) => `${x(round).toFixed(1)},${y(value).toFixed(1)}`).join(" ")}));
  for (const site of new Set(points.flatMap(score => Object.keys(score.sites))))
    line(points.filter(s => site in s.sites).map(s => [s.round, s.sites[site]]), "line");
  line(points.map(score => [score.round, score.mean]), "line strong");
  picture.append(drawn("circle", {class: "dot", cx: x(end.round), cy: y(end.mean), r: 4}));
}

function axes(picture, box, x, y, low, high, until) {
  const step = high - low > 0.5 ? 0.2 : high - low > 0.2 ? 0.1 : 0.05;
  for (let value = low; value < high + 1e-9; value += step) {
    picture.append(drawn("line", {class: "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value)}));
    const label = {x: box.left - 6, y: y(value) + 4, "text-anchor": "end"};
    picture.append(drawn("text", label, String(Math.round(100 * value))));
  }
  const each = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000].find(s => until / s <= (box.right - box.left) / 60) || 5000;
  for (let round = each; round <= until; round += each)
    picture.append(drawn("text", {x: x(round), y: box.bottom + 18, "text-anchor": "middle"}, String(round)));
}

function show(state) {
  last = state;
  const [words, kind] = phase(state);
  if ($("phase").textContent !== words) $("phase").textContent = words; // else it would be read aloud each time
  $("phase").className = `phase ${kind}`;
  $("at").textContent = new Date().toLocaleTimeString();
  $("no-sites").hidden = state.sites.length > 0;
  $("table").hidden = !state.sites.length;
  $("sites").replaceChildren(...state.sites.map(site => siteRow(site, state.now)));
  document.title = `${state.round}/${state.rounds} ${state.stalled ? "stalled" : state.phase} \u00b7 ${state.method}`;
  const same = JSON.stringify({...state, now: 0});
  if (same === shown) return;
  shown = same;
  $("name").textContent = state.name ? ` \u00b7 ${state.name}` : "";
  $("method").textContent = state.method || "Federation";
  $("bar").max = Math.max(1, state.rounds);
  $("bar").value = state.round;
  $("facts").replaceChildren(...facts(state));
  $("controls-part").hidden = !state.controls.length;
  $("controls").replaceChildren(...state.controls.map(c =>
    node("li", `${c.name}: ${c.done ? "done" : c.round ? `${plural(c.round, "round")} committed` : "not begun"}`)));
  $("failures-text").textContent = state.failures_total === 0 ? "None so far."
    : `${state.failures_total} in all, newest first.`;
  $("failures").replaceChildren(...state.failures.slice().reverse().map(failure));
  document.querySelector("main").hidden = false;
  curve(state);
}

function warn(text) {
  if ($("banner").textContent !== text) $("banner").textContent = text;
  $("banner").hidden = !text;
}

async function ask() {
  const answer = await fetch("state.json", {cache: "no-store", signal: AbortSignal.timeout(PATIENCE)});
  if (answer.status === 401) {
    warn("The token is no longer valid: open the address that was printed last.");
    return false;
  }
  const found = await answer.json();
  if (answer.ok) show(found);
  warn(answer.ok ? "" : `The run cannot be read: ${found.error} (${found.code}). What stands below is older.`);
  return true;
}

async function poll() {
  let goOn = true;
  try {
    if (!document.hidden) goOn = await ask();
  } catch (error) {
    warn(`No answer (${error.name}). What stands below is from the last one; asking again.`);
  }
  if (goOn) setTimeout(poll, EVERY);
}

window.addEventListener("resize", () => last && curve(last));
poll();
