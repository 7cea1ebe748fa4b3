// Closed candles in Node, with nothing installed: `node follow.mjs redis://127.0.0.1:6379 1m,5m`
// The embedded server listens on a unix socket: `node follow.mjs unix:///path/to/pkb.sock 1m,5m`
//
// Redis speaks RESP over a socket: a command is an array of strings, the first byte of a reply is its type.
// With the `redis` package from npm the same is `client.xRead(streams, { BLOCK: 1000, COUNT: 500 })`.

import net from "node:net";

const address = process.argv[2] ?? process.env.PKB_REDIS_URL ?? "redis://127.0.0.1:6379";
// Node accepts `unix://:password@/path` as a URL only with a host behind the password.
const url = new URL(address.replace(/^unix:\/\/([^/@]*@)?\//, "unix://$1localhost/"));
const intervals = process.argv[3]?.split(",");
const prefix = process.env.PKB_PREFIX ?? "pkb";
const socket = url.protocol === "unix:"
  ? net.connect(decodeURIComponent(url.pathname))
  : net.connect(Number(url.port || 6379), url.hostname);

let unread = Buffer.alloc(0);
let waiting;

// Parse one reply at offset `at`: [value, offset of the next reply], or null while bytes are missing.
function parse(at) {
  const end = unread.indexOf("\r\n", at);
  if (end < 0) return null;
  const line = unread.toString("utf8", at + 1, end);
  const next = end + 2;
  switch (String.fromCharCode(unread[at])) {
    case "+": return [line, next];
    case ":": return [Number(line), next];
    case "-": throw new Error(line);
    case "$": {
      const length = Number(line);
      if (length < 0) return [null, next];
      if (unread.length < next + length + 2) return null;
      return [unread.toString("utf8", next, next + length), next + length + 2];
    }
    default: { // an array
      const values = [];
      let offset = next;
      for (let n = Number(line); n > 0; n -= 1) {
        const found = parse(offset);
        if (found === null) return null;
        values.push(found[0]);
        offset = found[1];
      }
      return [Number(line) < 0 ? null : values, offset];
    }
  }
}

socket.on("data", (bytes) => {
  unread = Buffer.concat([unread, bytes]);
  try {
    const found = parse(0);
    if (found === null) return;
    unread = unread.subarray(found[1]);
    waiting.resolve(found[0]);
  } catch (error) {
    waiting.reject(error);
  }
});
socket.on("error", (error) => waiting.reject(error));

function command(...words) {
  const parts = words.map((word) => `$${Buffer.byteLength(String(word))}\r\n${word}\r\n`);
  socket.write(`*${words.length}\r\n${parts.join("")}`);
  return new Promise((resolve, reject) => { waiting = { resolve, reject }; });
}

if (url.password) {
  const names = url.username ? [decodeURIComponent(url.username)] : [];
  await command("AUTH", ...names, decodeURIComponent(url.password));
}

// The store holds its own layout. One stream a shard; "0" reads all entries held, "$" only new ones.
const shards = Number(await command("HGET", `${prefix}:meta`, "shards"));
const positions = new Map();
for (let shard = 0; shard < shards; shard += 1) positions.set(`${prefix}:{${shard}}:closed`, "0");

for (;;) {
  const read = ["XREAD", "COUNT", 500, "BLOCK", 1000, "STREAMS", ...positions.keys(), ...positions.values()];
  for (const [stream, entries] of (await command(...read)) ?? []) {
    for (const [id, cells] of entries) {
      positions.set(stream, id);
      const fields = Object.fromEntries(cells.flatMap((cell, n) => (n % 2 ? [] : [[cell, cells[n + 1]]])));
      if (intervals && !intervals.includes(fields.interval)) continue;
      const [start, open, high, low, close, volume, oi, ticks, flag = ""] = JSON.parse(fields.row);
      console.log(JSON.stringify({
        symbol: fields.symbol, interval: fields.interval, rev: Number(fields.rev),
        time: new Date(start * 1000).toISOString(), open, high, low, close, volume, oi, ticks, flag,
      }));
    }
  }
}
