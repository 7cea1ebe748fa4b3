"use strict";
// What comes from the server only ever becomes text of an element, never markup.

const POLL_MS = 2000, WATCHED_MAX = 30, CLOSED_SHOWN = 8, POINTS = 40;
const INTERVALS = ["1m", "2m", "3m", "4m", "5m", "10m", "15m", "30m", "60m", "day"];
const $ = (id) => document.getElementById(id);

// The token comes with the first URL; it stays in this tab and leaves the address bar.
const address = new URL(location.href);
if (address.searchParams.has("token")) {
  sessionStorage.setItem("token", address.searchParams.get("token"));
  address.searchParams.delete("token");
  history.replaceState(null, "", address);
}
const token = sessionStorage.getItem("token") || "";

const kept = (name, otherwise) => {
  try { return JSON.parse(localStorage.getItem(name)) ?? otherwise; } catch { return otherwise; }
};
const keep = (name, value) => localStorage.setItem(name, JSON.stringify(value));
let watched = kept("pkb.symbols", []).filter((each) => typeof each === "string").slice(0, WATCHED_MAX);
let interval = INTERVALS.includes(kept("pkb.interval", "1m")) ? kept("pkb.interval", "1m") : "1m";

async function ask(path) {
  const answer = await fetch(path, {headers: token ? {Authorization: `Bearer ${token}`} : {}});
  const found = await answer.json();
  if (!answer.ok && !("health" in found)) throw Object.assign(new Error(found.error), found);
  return found;
}

function make(tag, text = "", kind = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

const whole = (value) => Math.round(value).toLocaleString("en-IN");
const price = (value) => value.toLocaleString("en-IN", {minimumFractionDigits: 2, maximumFractionDigits: 4});
const clock = (start) => new Date(start * 1000).toLocaleTimeString("en-GB", {
  timeZone: "Asia/Kolkata", hour: "2-digit", minute: "2-digit",
});

// --- health

async function showStatus() {
  let found;
  try {
    found = await ask("/api/status");
  } catch (error) {
    found = {health: "down", findings: [{check: "web", level: "fail", what: error.message, mend: ""}]};
  }
  $("health").textContent = found.health;
  $("health").className = `badge ${found.health}`;
  $("place").textContent = found.redis ? found.redis.place : "";
  const workers = (found.workers || []).filter((each) => each.age_ms !== null);
  const shards = found.shards || [];
  const rate = workers.filter((each) => each.role === "ingest")
    .reduce((sum, each) => sum + (each.ticks_per_second || 0), 0);
  const memory = found.redis ? found.redis.servers.reduce((sum, each) => sum + each.used_bytes, 0) : 0;
  const figures = [
    [whole(rate), "ticks a second"],
    [`${whole(Math.max(0, ...shards.map((each) => each.lag_ms)))} ms`, "lag of the slowest shard"],
    [whole(shards.reduce((sum, each) => sum + each.lag_entries, 0)), "entries wait"],
    [`${whole(memory / 1e6)} MB`, "Redis"],
    [String(workers.length), "workers"],
  ];
  $("figures").replaceChildren(...figures.map(([value, name]) => {
    const box = make("div", "", "figure");
    box.append(make("b", value), make("span", name));
    return box;
  }));
  $("findings").replaceChildren(...found.findings.filter((each) => each.level !== "ok").map((each) => {
    const line = make("li", `${each.check}: ${each.what}`, each.level);
    if (each.hint) line.append(make("small", each.hint));
    return line;
  }));
  $("workers").tBodies[0].replaceChildren(...workers.map((each) => {
    const row = make("tr");
    row.append(
      make("td", each.id), make("td", `${(each.age_ms / 1000).toFixed(1)} s`, "n"),
      make("td", whole(each.ticks_per_second || 0), "n"), make("td", whole(each.ticks_total || 0), "n"));
    return row;
  }));
}

// --- candles

function spark(rows) {
  const space = "http://www.w3.org/2000/svg";
  const picture = document.createElementNS(space, "svg");
  const closes = rows.map((row) => row[4]);
  const low = Math.min(...closes), span = Math.max(...closes) - low || 1;
  const line = document.createElementNS(space, "polyline");
  const step = 100 / Math.max(1, closes.length - 1);
  line.setAttribute("points", closes.map((each, i) => `${i * step},${23 - 22 * (each - low) / span}`).join(" "));
  picture.setAttribute("viewBox", "0 0 100 24");
  picture.setAttribute("preserveAspectRatio", "none");
  picture.append(line);
  return picture;
}

function rowOf(symbol, rows) {
  const row = make("tr"), last = rows.at(-1);
  row.append(make("td", symbol.replace(/^NSE:/, "")));
  if (last) {
    const [start, open, high, low, close, volume, , ticks] = last;
    const before = rows.length > 1 ? rows.at(-2)[4] : open;
    const change = before ? 100 * (close / before - 1) : 0;
    row.append(
      make("td", price(close), "n"), make("td", change.toFixed(2), `n ${change < 0 ? "fall" : "up"}`),
      make("td", price(open), "n opt"), make("td", price(high), "n opt"), make("td", price(low), "n opt"),
      make("td", whole(volume), "n"), make("td", whole(ticks), "n opt"), make("td", clock(start), "opt"));
  } else {
    row.append(make("td", "no candle yet"), make("td"), make("td", "", "opt"), make("td", "", "opt"),
      make("td", "", "opt"), make("td"), make("td", "", "opt"), make("td", "", "opt"));
  }
  const picture = make("td"), end = make("td"), remove = make("button", "×");
  if (last) picture.append(spark(rows));
  remove.setAttribute("aria-label", `Remove ${symbol}`);
  remove.onclick = () => watch(watched.filter((each) => each !== symbol));
  end.append(remove);
  row.append(picture, end);
  return row;
}

async function showCandles() {
  if (!watched.length) {
    $("candles").tBodies[0].replaceChildren();
    return;
  }
  const query = new URLSearchParams({symbols: watched.join(","), interval, count: POINTS, current: 1});
  try {
    const {candles} = await ask(`/api/bulk?${query}`);
    $("candles").tBodies[0].replaceChildren(...Object.entries(candles).map(([name, rows]) => rowOf(name, rows)));
  } catch (error) {
    if (error.symbol) watch(watched.filter((each) => each !== error.symbol));
  }
}

function watch(symbols) {
  watched = [...new Set(symbols)].slice(-WATCHED_MAX);
  keep("pkb.symbols", watched);
  showCandles();
  follow();
}

// --- closed candles

let events = null, position = "", again = 0;

function follow() {
  clearTimeout(again);
  if (events) events.close();
  if (!watched.length) return;
  const query = new URLSearchParams({symbols: watched.join(","), intervals: interval});
  if (token) query.set("token", token);
  if (position) query.set("position", position);
  events = new EventSource(`/api/closed?${query}`);
  events.addEventListener("closed", (message) => {
    position = message.lastEventId;
    const {symbol, interval, row: [start, open, high, low, close, volume], rev} = JSON.parse(message.data);
    const line = make("li");
    line.append(make("b", `${symbol} ${interval} ${clock(start)}`),
      ` ${price(open)} ${price(high)} ${price(low)} ${price(close)} · ${whole(volume)}${rev ? " · amended" : ""}`);
    $("closed").prepend(line);
    while ($("closed").children.length > CLOSED_SHOWN) $("closed").lastChild.remove();
  });
  // A browser gives up on an answer that is no stream, such as 503; and a position may be of an older store.
  events.onerror = () => {
    if (events.readyState !== EventSource.CLOSED) return;
    position = "";
    again = setTimeout(follow, POLL_MS);
  };
}

// --- search

let typed = 0;

$("query").oninput = () => {
  clearTimeout(typed);
  typed = setTimeout(search, 250);
};
$("search").onsubmit = (submitted) => {
  submitted.preventDefault();
  search();
};

async function search() {
  const text = $("query").value.trim();
  if (!text) return $("found").replaceChildren();
  let found;
  try {
    found = await ask(`/api/search?${new URLSearchParams({q: text, limit: 8})}`);
  } catch (error) {
    return $("found").replaceChildren(make("small", error.message));
  }
  if (text !== $("query").value.trim()) return undefined;
  if (!found.length) return $("found").replaceChildren(make("small", "nothing like that"));
  return $("found").replaceChildren(...found.map(({symbol, name}) => {
    const button = make("button", symbol + (name ? " " : ""));
    if (name) button.append(make("small", name));
    button.type = "button";
    button.onclick = () => {
      $("query").value = "";
      $("found").replaceChildren();
      watch([...watched, symbol]);
    };
    return button;
  }));
}

// --- begin

$("interval").replaceChildren(...INTERVALS.map((name) => {
  const option = make("option", name);
  option.selected = name === interval;
  return option;
}));
$("interval").onchange = () => {
  interval = $("interval").value;
  keep("pkb.interval", interval);
  showCandles();
  follow();
};

async function everySoOften(show) {
  for (;;) {
    if (!document.hidden) await show();
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

(async () => {
  everySoOften(showStatus);
  if (!watched.length) {
    try { watched = (await ask("/api/search?limit=8")).map((each) => each.symbol); } catch { /* shown above */ }
  }
  follow();
  everySoOften(showCandles);
})();
