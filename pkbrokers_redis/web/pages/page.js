"use strict";
// Data from the server only becomes text of an element, never markup.

const POLL_MS = 2000, WATCHLIST_MAX = 30, CLOSED_SHOWN = 8, POINTS = 40;
const INTERVALS = ["1m", "2m", "3m", "4m", "5m", "10m", "15m", "30m", "60m", "day"];
const $ = (id) => document.getElementById(id);

// The first URL holds the token. It is moved to this tab's session storage and removed from the address bar.
const address = new URL(location.href);
if (address.searchParams.has("token")) {
  sessionStorage.setItem("token", address.searchParams.get("token"));
  address.searchParams.delete("token");
  history.replaceState(null, "", address);
}
const token = sessionStorage.getItem("token") || "";

const stored = (name, fallback) => {
  try { return JSON.parse(localStorage.getItem(name)) ?? fallback; } catch { return fallback; }
};
const save = (name, value) => localStorage.setItem(name, JSON.stringify(value));
let watchlist = stored("pkb.symbols", []).filter((symbol) => typeof symbol === "string").slice(0, WATCHLIST_MAX);
let interval = INTERVALS.includes(stored("pkb.interval", "1m")) ? stored("pkb.interval", "1m") : "1m";

async function getJson(path) {
  const response = await fetch(path, {headers: token ? {Authorization: `Bearer ${token}`} : {}});
  const body = await response.json();
  if (!response.ok && !("health" in body)) throw Object.assign(new Error(body.error), body);
  return body;
}

function make(tag, text = "", kind = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  if (kind) element.className = kind;
  return element;
}

const formatInt = (value) => Math.round(value).toLocaleString("en-IN");
const formatPrice = (value) => value.toLocaleString("en-IN", {minimumFractionDigits: 2, maximumFractionDigits: 4});
const formatTime = (start) => new Date(start * 1000).toLocaleTimeString("en-GB", {
  timeZone: "Asia/Kolkata", hour: "2-digit", minute: "2-digit",
});

// --- health

async function showStatus() {
  let status;
  try {
    status = await getJson("/api/status");
  } catch (error) {
    status = {health: "down", findings: [{check: "web", level: "fail", what: error.message, hint: ""}]};
  }
  $("health").textContent = status.health;
  $("health").className = `badge ${status.health}`;
  $("place").textContent = status.redis ? status.redis.place : "";
  const workers = (status.workers || []).filter((worker) => worker.age_ms !== null);
  const shards = status.shards || [];
  const rate = workers.filter((worker) => worker.role === "ingest")
    .reduce((sum, worker) => sum + (worker.ticks_per_second || 0), 0);
  const memory = status.redis ? status.redis.servers.reduce((sum, server) => sum + server.used_bytes, 0) : 0;
  const figures = [
    [formatInt(rate), "ticks a second"],
    [`${formatInt(Math.max(0, ...shards.map((shard) => shard.lag_ms)))} ms`, "lag of the slowest shard"],
    [formatInt(shards.reduce((sum, shard) => sum + shard.lag_entries, 0)), "entries wait"],
    [`${formatInt(memory / 1e6)} MB`, "Redis"],
    [String(workers.length), "workers"],
  ];
  $("figures").replaceChildren(...figures.map(([value, name]) => {
    const box = make("div", "", "figure");
    box.append(make("b", value), make("span", name));
    return box;
  }));
  $("findings").replaceChildren(...status.findings.filter((finding) => finding.level !== "ok").map((each) => {
    const line = make("li", `${each.check}: ${each.message}`, each.level);
    if (each.hint) line.append(make("small", each.hint));
    return line;
  }));
  $("workers").tBodies[0].replaceChildren(...workers.map((each) => {
    const row = make("tr");
    row.append(
      make("td", each.id), make("td", `${(each.age_ms / 1000).toFixed(1)} s`, "n"),
      make("td", formatInt(each.ticks_per_second || 0), "n"),
      make("td", formatInt(each.ticks_total || 0), "n"));
    return row;
  }));
}

// --- candles

function spark(rows) {
  const space = "http://www.w3.org/2000/svg";
  const chart = document.createElementNS(space, "svg");
  const closes = rows.map((row) => row[4]);
  const low = Math.min(...closes), span = Math.max(...closes) - low || 1;
  const line = document.createElementNS(space, "polyline");
  const step = 100 / Math.max(1, closes.length - 1);
  line.setAttribute("points", closes.map((each, i) => `${i * step},${23 - 22 * (each - low) / span}`).join(" "));
  chart.setAttribute("viewBox", "0 0 100 24");
  chart.setAttribute("preserveAspectRatio", "none");
  chart.append(line);
  return chart;
}

function candleRow(symbol, rows) {
  const row = make("tr"), last = rows.at(-1);
  row.append(make("td", symbol.replace(/^NSE:/, "")));
  if (last) {
    const [start, open, high, low, close, volume, , ticks] = last;
    const previous = rows.length > 1 ? rows.at(-2)[4] : open;
    const change = previous ? 100 * (close / previous - 1) : 0;
    row.append(
      make("td", formatPrice(close), "n"),
      make("td", change.toFixed(2), `n ${change < 0 ? "fall" : "up"}`),
      make("td", formatPrice(open), "n opt"), make("td", formatPrice(high), "n opt"),
      make("td", formatPrice(low), "n opt"),
      make("td", formatInt(volume), "n"), make("td", formatInt(ticks), "n opt"),
      make("td", formatTime(start), "opt"));
  } else {
    row.append(make("td", "no candle yet"), make("td"), make("td", "", "opt"), make("td", "", "opt"),
      make("td", "", "opt"), make("td"), make("td", "", "opt"), make("td", "", "opt"));
  }
  const chart = make("td"), end = make("td"), remove = make("button", "×");
  if (last) chart.append(spark(rows));
  remove.setAttribute("aria-label", `Remove ${symbol}`);
  remove.onclick = () => watch(watchlist.filter((each) => each !== symbol));
  end.append(remove);
  row.append(chart, end);
  return row;
}

async function showCandles() {
  if (!watchlist.length) {
    $("candles").tBodies[0].replaceChildren();
    return;
  }
  const query = new URLSearchParams({symbols: watchlist.join(","), interval, count: POINTS, current: 1});
  try {
    const {candles} = await getJson(`/api/bulk?${query}`);
    $("candles").tBodies[0].replaceChildren(...Object.entries(candles).map(([name, rows]) => candleRow(name, rows)));
  } catch (error) {
    if (error.symbol) watch(watchlist.filter((each) => each !== error.symbol));
  }
}

function watch(symbols) {
  watchlist = [...new Set(symbols)].slice(-WATCHLIST_MAX);
  save("pkb.symbols", watchlist);
  showCandles();
  follow();
}

// --- closed candles

let events = null, position = "", retryTimer = 0;

function follow() {
  clearTimeout(retryTimer);
  if (events) events.close();
  if (!watchlist.length) return;
  const query = new URLSearchParams({symbols: watchlist.join(","), intervals: interval});
  if (token) query.set("token", token);
  if (position) query.set("position", position);
  events = new EventSource(`/api/closed?${query}`);
  events.addEventListener("closed", (message) => {
    position = message.lastEventId;
    const {symbol, interval, row: [start, open, high, low, close, volume], rev} = JSON.parse(message.data);
    const line = make("li");
    line.append(make("b", `${symbol} ${interval} ${formatTime(start)}`),
      ` ${[open, high, low, close].map(formatPrice).join(" ")} · ${formatInt(volume)}${rev ? " · amended" : ""}`);
    $("closed").prepend(line);
    while ($("closed").children.length > CLOSED_SHOWN) $("closed").lastChild.remove();
  });
  // A browser does not retry after a response that is not a stream, such as 503. The position can also belong
  // to an older store, so the retry starts without one.
  events.onerror = () => {
    if (events.readyState !== EventSource.CLOSED) return;
    position = "";
    retryTimer = setTimeout(follow, POLL_MS);
  };
}

// --- search

let searchTimer = 0;

$("query").oninput = () => {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(search, 250);
};
$("search").onsubmit = (event) => {
  event.preventDefault();
  search();
};

async function search() {
  const text = $("query").value.trim();
  if (!text) return $("found").replaceChildren();
  let matches;
  try {
    matches = await getJson(`/api/search?${new URLSearchParams({q: text, limit: 8})}`);
  } catch (error) {
    return $("found").replaceChildren(make("small", error.message));
  }
  if (text !== $("query").value.trim()) return undefined;
  if (!matches.length) return $("found").replaceChildren(make("small", "nothing like that"));
  return $("found").replaceChildren(...matches.map(({symbol, name}) => {
    const button = make("button", symbol + (name ? " " : ""));
    if (name) button.append(make("small", name));
    button.type = "button";
    button.onclick = () => {
      $("query").value = "";
      $("found").replaceChildren();
      watch([...watchlist, symbol]);
    };
    return button;
  }));
}

// --- start

$("interval").replaceChildren(...INTERVALS.map((name) => {
  const option = make("option", name);
  option.selected = name === interval;
  return option;
}));
$("interval").onchange = () => {
  interval = $("interval").value;
  save("pkb.interval", interval);
  showCandles();
  follow();
};

async function repeatWhileVisible(show) {
  for (;;) {
    if (!document.hidden) await show();
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

(async () => {
  repeatWhileVisible(showStatus);
  if (!watchlist.length) {
    try { watchlist = (await getJson("/api/search?limit=8")).map((each) => each.symbol); }
    catch { /* showStatus shows it */ }
  }
  follow();
  repeatWhileVisible(showCandles);
})();
