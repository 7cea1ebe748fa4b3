#!lua name=pkbrokers

--[[ The one place that writes candles. Everything of a batch and shard in one call, or nothing.

KEYS  1 P:{S}:cursor   hash    id, epoch, read, src:<id> → last seq
      2 P:{S}:ticks    stream  its group `aggregator` carries the committed position
      3 P:{S}:state    hash    token → what the aggregator remembers beside the rows
      4 P:{S}:closed   stream  announced candles
and, under the same hash tag, ARGV "base" .. : current:<token>, candles:<token>:<interval>.

A command on a key that somebody filled with another type fails alone: the key's name is returned,
everything else is written. ]]

local GROUP = 'aggregator'
local CHUNK = 1000 -- arguments of one call; Lua's stack ends at about 8,000

-- Run a command; note the key instead of raising when it holds another type.
local function try(bad, key, ...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then
    bad[#bad + 1] = key .. ' ' .. reply.err
    return nil, reply.err
  end
  return reply
end

local function start_of(row)
  return tonumber(string.match(row, '^%[(%d+)') or '0')
end

-- Put a row into its list by its start: append, replace, or insert; never two of one start.
local function put(bad, key, start, keep, row)
  local tail, err = try(bad, key, 'LINDEX', key, -1)
  if err then return end
  if not tail or start_of(tail) < start then
    redis.call('RPUSH', key, row)
    redis.call('LTRIM', key, -keep, -1)
    return
  end
  if start_of(tail) == start then
    redis.call('LSET', key, -1, row)
    return
  end
  local rows = redis.call('LRANGE', key, 0, -1)
  for n = #rows, 1, -1 do
    local other = start_of(rows[n])
    if other == start then
      redis.call('LSET', key, n - 1, row)
      return
    elseif other < start then
      redis.call('LINSERT', key, 'AFTER', rows[n], row)
      redis.call('LTRIM', key, -keep, -1)
      return
    end
  end
  if #rows < keep then redis.call('LPUSH', key, row) end
end

local function hset_all(bad, key, args, from, to)
  while from <= to do
    local last = math.min(from + CHUNK - 1, to)
    try(bad, key, 'HSET', key, unpack(args, from, last))
    from = last + 1
  end
end

--[[ ARGV: base, epoch, id we left in the cursor, id to leave there, entries read so far, cap of closed,
then counted sections: sources (src seq), currents (token n (interval row)×n), drops (token interval),
puts (token interval start keep row), closed (token symbol interval row rev), state (field value).
Returns the names of keys that refused. ]]
local function commit(keys, args)
  local cursor, ticks, state, closed = keys[1], keys[2], keys[3], keys[4]
  local base, epoch, was, id, read, cap = args[1], args[2], args[3], args[4], args[5], args[6]
  local held = redis.call('HMGET', cursor, 'id', 'epoch')
  local owner = tonumber(held[2] or '0') or 0
  if owner > tonumber(epoch) then
    return redis.error_reply('FENCED epoch ' .. owner .. ' owns the shard, not ' .. epoch)
  end
  if owner < tonumber(epoch) then -- no other owner: the data went back (flushed, or an older copy)
    return redis.error_reply('STALE the shard is at epoch ' .. owner .. ', not ' .. epoch)
  end
  if (held[1] or '0-0') ~= was then
    return redis.error_reply('STALE the cursor is at ' .. (held[1] or '0-0') .. ', not ' .. was)
  end
  local bad = {}
  local i = 7
  local function count()
    i = i + 1
    return tonumber(args[i - 1])
  end

  local n = count()
  if n > 0 then
    redis.call('HSET', cursor, unpack(args, i, i + 2 * n - 1))
    i = i + 2 * n
  end
  for _ = 1, count() do
    local key = base .. 'current:' .. args[i]
    local pairs_n = 2 * tonumber(args[i + 1])
    try(bad, key, 'HSET', key, unpack(args, i + 2, i + 1 + pairs_n))
    i = i + 2 + pairs_n
  end
  for _ = 1, count() do
    local key = base .. 'current:' .. args[i]
    try(bad, key, 'HDEL', key, args[i + 1])
    i = i + 2
  end
  for _ = 1, count() do
    put(bad, base .. 'candles:' .. args[i] .. ':' .. args[i + 1], tonumber(args[i + 2]), args[i + 3], args[i + 4])
    i = i + 5
  end
  for _ = 1, count() do
    try(bad, closed, 'XADD', closed, 'MAXLEN', '~', cap, '*', 'token', args[i], 'symbol', args[i + 1],
      'interval', args[i + 2], 'row', args[i + 3], 'rev', args[i + 4])
    i = i + 5
  end
  local fields = 2 * count()
  hset_all(bad, state, args, i, i + fields - 1)

  if id ~= was then
    redis.call('HSET', cursor, 'id', id, 'read', read)
    local _, err = try({}, ticks, 'XGROUP', 'SETID', ticks, GROUP, id, 'ENTRIESREAD', read)
    if err then
      try(bad, ticks, 'XGROUP', 'CREATE', ticks, GROUP, id, 'MKSTREAM', 'ENTRIESREAD', read)
    end
  end
  return bad
end

-- Become the shard's owner: whoever held a lower epoch cannot commit any more. Returns the new epoch.
local function claim(keys)
  return redis.call('HINCRBY', keys[1], 'epoch', 1)
end

redis.register_function('pkb_commit', commit)
redis.register_function('pkb_claim', claim)
