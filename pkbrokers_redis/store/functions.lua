#!lua name=pkbrokers

--[[ All scripts of the store, as one function library. `functions.py` loads and calls it.

function          keys                            what it does
pkb_commit        cursor, ticks, state, closed    write all changes of one shard, or none
pkb_lease         cursor, lease                   acquire or renew a shard's lease; returns its epoch
pkb_hold          lease                           acquire or renew a plain lease
pkb_release       lease                           give up a lease of either kind
pkb_announce      workers                         record that a worker is alive
pkb_members       workers                         list the living workers of a role
pkb_limit_take    limit                           reserve the next request slot of a rate limit
pkb_limit_block   limit                           keep a rate limit closed for a while (429)
pkb_limit_closed  limit                           return whether a rate limit is closed
pkb_migrate       state                           rename the state fields of schema 1

All times are Redis's own (TIME, PX), so that the clocks of the hosts do not matter. ]]

local GROUP = 'aggregator'
local CHUNK = 1000 -- arguments of one call; Lua's stack ends at about 8,000
local FORGET_MS = 600000 -- a worker without a sign of life for ten minutes leaves the list

-- Run a command. A key of another type fails alone: append its name to `refused` instead of raising.
local function try(refused, key, ...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then
    refused[#refused + 1] = key .. ' ' .. reply.err
    return nil, reply.err
  end
  return reply
end

local function start_of(row)
  return tonumber(string.match(row, '^%[(%d+)') or '0')
end

-- Write a row into its list, which is sorted by start: append, replace or insert it.
local function upsert_row(refused, key, start, keep, row)
  local tail, err = try(refused, key, 'LINDEX', key, -1)
  if err then return end
  local newest = tail and start_of(tail) or 0
  if not tail or (newest > 0 and newest < start) then
    redis.call('RPUSH', key, row)
    redis.call('LTRIM', key, -keep, -1)
    return
  end
  if newest == start then
    redis.call('LSET', key, -1, row)
    return
  end
  local rows, later = redis.call('LRANGE', key, 0, -1), nil
  for n = #rows, 1, -1 do
    local found = start_of(rows[n]) -- 0 for a text that is no row: skipped
    if found == start then
      redis.call('LSET', key, n - 1, row)
      return
    elseif found > start then
      later = rows[n]
    elseif found > 0 then
      if later then
        redis.call('LINSERT', key, 'BEFORE', later, row)
      else
        redis.call('RPUSH', key, row)
      end
      redis.call('LTRIM', key, -keep, -1)
      return
    end
  end
  if #rows < tonumber(keep) then redis.call('LPUSH', key, row) end
end

-- Replace a whole list by args[from..to].
local function replace_list(refused, key, args, from, to)
  local _, err = try(refused, key, 'LTRIM', key, 1, 0) -- empties a list, fails on another type
  while from <= to and not err do
    local last = math.min(from + CHUNK - 1, to)
    redis.call('RPUSH', key, unpack(args, from, last))
    from = last + 1
  end
end

local function hset_all(refused, key, args, from, to)
  while from <= to do
    local last = math.min(from + CHUNK - 1, to)
    try(refused, key, 'HSET', key, unpack(args, from, last))
    from = last + 1
  end
end

-- Compare stream ids: is `id` the later one?
local function is_later(id, earlier)
  local ms, seq = string.match(id, '^(%d+)-(%d+)')
  local earlier_ms, earlier_seq = string.match(earlier, '^(%d+)-(%d+)')
  if ms ~= earlier_ms then return tonumber(ms) > tonumber(earlier_ms) end
  return tonumber(seq) > tonumber(earlier_seq)
end

-- Return whether the stream never held the entry. Then it was read from another server, whose place a
-- lagging replica has taken. An entry that the hard cap removed is older than the first entry left.
local function never_held(ticks, id)
  local found = redis.pcall('XRANGE', ticks, id, id)
  if found.err or #found > 0 then return false end
  local first = redis.call('XRANGE', ticks, '-', '+', 'COUNT', 1)[1]
  return not first or is_later(id, first[1])
end

-- XINFO's lag is entries added minus entries read. It also counts entries that the hard cap removed or that
-- were deleted with their stream. When no entry follows `id`, the group has read everything: correct it.
local function correct_lag(ticks, id, read)
  local groups = redis.pcall('XINFO', 'GROUPS', ticks)
  for _, group in ipairs(groups.err and {} or groups) do
    local name, lag = group[2], group[12]
    if name == GROUP and lag and lag ~= 0 and #redis.call('XRANGE', ticks, '(' .. id, '+', 'COUNT', 1) == 0 then
      redis.call('XGROUP', 'SETID', ticks, GROUP, id, 'ENTRIESREAD', read + lag)
    end
  end
end

--[[ Write everything that a batch of ticks changed in one shard, in one step. The only writer of candles.

KEYS  1 P:{S}:cursor   hash    id, read, repair, commits, epoch, owner, src:<id> → last seq
      2 P:{S}:ticks    stream  its group `aggregator` carries the committed position
      3 P:{S}:state    hash    what the aggregator needs to resume, besides the rows
      4 P:{S}:closed   stream  announced candles
      then, on a cluster only, every other key that the commit writes or reads

ARGV  1 base           prefix of the shard's keys, `P:{S}:`
      2 owner          the worker's id
      3 epoch          of its lease
      4 commits        number of commits before this one
      5 from id        stream id in the cursor before this commit
      6 to id          stream id to leave there
      7 read           entries read since the stream began
      8 cap            MAXLEN of closed
      9 repair         id of the last repair in this commit, '' for none
     10…               sections. Each is a count, followed by so many of:
                         sources   src:<id> seq                          last sequence number of a producer
                         evicted   src:<id>                              producers to forget
                         current   token n (interval row)×n              open candles
                         drop      token interval                        open candles to remove
                         list      token interval n row×n                whole lists
                         upsert    token interval start keep row         completed rows
                         closed    token symbol interval row rev         announcements
                         state     field value
                         forget    token n interval×n                    instruments to delete

Returns the keys of another type, each with Redis's error; everything else is written.
Errors: FENCED when another worker owns the shard. STALE when the data are not as this worker left them
(flushed, or an older copy after a failover): it must load the shard again. ]]
local function commit(keys, args)
  local cursor, ticks, state, closed = keys[1], keys[2], keys[3], keys[4]
  local base, owner, epoch, commits = args[1], args[2], args[3], args[4]
  local from_id, id, read, cap, repair = args[5], args[6], args[7], args[8], args[9]
  local held = redis.call('HMGET', cursor, 'owner', 'epoch', 'commits', 'id')
  local held_epoch = tonumber(held[2] or '0') or 0
  if held_epoch < tonumber(epoch) then -- no later owner: the data are older than this lease
    return redis.error_reply('STALE the shard is in epoch ' .. held_epoch .. ', not ' .. epoch)
  end
  if held_epoch > tonumber(epoch) or held[1] ~= owner then
    return redis.error_reply('FENCED ' .. (held[1] or 'nobody') .. ' owns the shard in epoch ' .. held_epoch
      .. ', this is ' .. owner .. ' of epoch ' .. epoch)
  end
  if (held[3] or '0') ~= commits or (held[4] or '0-0') ~= from_id then
    return redis.error_reply('STALE the cursor is at commit ' .. (held[3] or '0') .. ', ' .. (held[4] or '0-0')
      .. ', not at ' .. commits .. ', ' .. from_id)
  end
  if id ~= from_id and never_held(ticks, id) then
    return redis.error_reply('STALE the stream never held entry ' .. id)
  end
  if repair ~= '' and never_held(base .. 'repairs', repair) then
    return redis.error_reply('STALE the repairs never held entry ' .. repair)
  end
  local refused = {}
  local i = 10
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
    redis.call('HDEL', cursor, args[i])
    i = i + 1
  end
  for _ = 1, count() do
    local key = base .. 'current:' .. args[i]
    local pairs_n = 2 * tonumber(args[i + 1])
    try(refused, key, 'HSET', key, unpack(args, i + 2, i + 1 + pairs_n))
    i = i + 2 + pairs_n
  end
  for _ = 1, count() do
    local key = base .. 'current:' .. args[i]
    try(refused, key, 'HDEL', key, args[i + 1])
    i = i + 2
  end
  for _ = 1, count() do
    local key, rows = base .. 'candles:' .. args[i] .. ':' .. args[i + 1], tonumber(args[i + 2])
    replace_list(refused, key, args, i + 3, i + 2 + rows)
    i = i + 3 + rows
  end
  for _ = 1, count() do
    local key = base .. 'candles:' .. args[i] .. ':' .. args[i + 1]
    upsert_row(refused, key, tonumber(args[i + 2]), args[i + 3], args[i + 4])
    i = i + 5
  end
  for _ = 1, count() do
    try(refused, closed, 'XADD', closed, 'MAXLEN', '~', cap, '*', 'token', args[i], 'symbol', args[i + 1],
      'interval', args[i + 2], 'row', args[i + 3], 'rev', args[i + 4])
    i = i + 5
  end
  local fields = 2 * count()
  hset_all(refused, state, args, i, i + fields - 1)
  i = i + fields
  for _ = 1, count() do
    local token, names = args[i], tonumber(args[i + 1])
    try(refused, state, 'HDEL', state, token, token .. ':candles', token .. ':revs')
    for _, key in ipairs({base .. 'current:' .. token, base .. 'quote:' .. token}) do
      try(refused, key, 'DEL', key)
    end
    for name = i + 2, i + 1 + names do
      redis.call('DEL', base .. 'candles:' .. token .. ':' .. args[name])
    end
    i = i + 2 + names
  end

  redis.call('HSET', cursor, 'id', id, 'read', read, 'commits', tonumber(commits) + 1)
  if repair ~= '' then redis.call('HSET', cursor, 'repair', repair) end
  if id ~= from_id then
    local _, err = try({}, ticks, 'XGROUP', 'SETID', ticks, GROUP, id, 'ENTRIESREAD', read)
    if err then
      try(refused, ticks, 'XGROUP', 'CREATE', ticks, GROUP, id, 'MKSTREAM', 'ENTRIESREAD', read)
    end
    correct_lag(ticks, id, read)
  end
  return refused
end

--[[ Acquire or renew the lease of a shard. KEYS cursor, lease; ARGV owner, TTL in ms.
Returns the epoch to commit with, 0 when another worker holds the lease. The epoch rises whenever the lease was
free: then no earlier owner can commit any more, and the new one must load the shard. ]]
local function lease(keys, args)
  local cursor, key, owner, ttl_ms = keys[1], keys[2], args[1], args[2]
  local holder = redis.call('GET', key)
  if holder and holder ~= owner then return 0 end
  local held = redis.call('HMGET', cursor, 'owner', 'epoch')
  if holder and held[1] == owner and tonumber(held[2]) then
    redis.call('PEXPIRE', key, ttl_ms)
    return tonumber(held[2])
  end
  local epoch = redis.call('HINCRBY', cursor, 'epoch', 1)
  redis.call('HSET', cursor, 'owner', owner)
  redis.call('SET', key, owner, 'PX', ttl_ms)
  return epoch
end

-- Acquire or renew a plain lease. KEYS lease; ARGV owner, TTL in ms. Returns 0 when another owner holds it.
local function hold(keys, args)
  local holder = redis.call('GET', keys[1])
  if holder and holder ~= args[1] then return 0 end
  redis.call('SET', keys[1], args[1], 'PX', args[2])
  return 1
end

-- Give up a lease of either kind. KEYS lease; ARGV owner. Returns 0 when this owner does not hold it.
local function release(keys, args)
  if redis.call('GET', keys[1]) ~= args[1] then return 0 end
  return redis.call('DEL', keys[1])
end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Record that a worker is alive. KEYS workers; ARGV `<role> <id>`.
local function announce(keys, args)
  local now = now_ms()
  redis.call('ZADD', keys[1], now, args[1])
  redis.call('ZREMRANGEBYSCORE', keys[1], '-inf', now - FORGET_MS)
  return now
end

-- List the living workers of a role. KEYS workers; ARGV role, maximum age of the last sign of life in ms.
local function members(keys, args)
  local ids, role = {}, args[1] .. ' '
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', keys[1], now_ms() - args[2], '+inf')) do
    if string.sub(member, 1, #role) == role then ids[#ids + 1] = string.sub(member, #role + 1) end
  end
  return ids
end

local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

--[[ Reserve the next free slot of a rate limit. KEYS limit; ARGV µs between slots, longest wait in µs.
Returns {µs to wait, slot}, or {-µs, '0'} when the wait would be too long. ]]
local function limit_take(keys, args)
  local now = now_us()
  local held = redis.call('HMGET', keys[1], 'next', 'blocked')
  local slot = math.max(now, tonumber(held[1] or '0') or 0, tonumber(held[2] or '0') or 0)
  local wait = slot - now
  if wait > tonumber(args[2]) then return {-wait, '0'} end
  redis.call('HSET', keys[1], 'next', string.format('%.0f', slot + args[1]))
  redis.call('PEXPIRE', keys[1], math.ceil((wait + args[1]) / 1000) + 60000)
  return {wait, string.format('%.0f', slot)}
end

-- Close a rate limit. KEYS limit; ARGV µs during which no request may be made.
local function limit_block(keys, args)
  local held = tonumber(redis.call('HGET', keys[1], 'blocked') or '0') or 0
  redis.call('HSET', keys[1], 'blocked', string.format('%.0f', math.max(now_us() + args[1], held)))
  redis.call('PEXPIRE', keys[1], math.max(redis.call('PTTL', keys[1]), math.ceil(args[1] / 1000) + 60000))
  return 1
end

-- Return 1 while a rate limit is closed, else 0. KEYS limit.
local function limit_closed(keys)
  local blocked = tonumber(redis.call('HGET', keys[1], 'blocked') or '0') or 0
  return blocked > now_us() and 1 or 0
end

-- Rename the fields `<token>:marks` of schema 1 to `<token>:candles`. KEYS state. Returns how many.
local function migrate(keys)
  local renamed, fields = 0, redis.call('HGETALL', keys[1])
  for n = 1, #fields, 2 do
    local token = string.match(fields[n], '^(%d+):marks$')
    if token then
      redis.call('HSETNX', keys[1], token .. ':candles', fields[n + 1])
      redis.call('HDEL', keys[1], fields[n])
      renamed = renamed + 1
    end
  end
  return renamed
end

redis.register_function('pkb_commit', commit)
redis.register_function('pkb_lease', lease)
redis.register_function('pkb_hold', hold)
redis.register_function('pkb_release', release)
redis.register_function('pkb_announce', announce)
redis.register_function{function_name = 'pkb_members', callback = members, flags = {'no-writes'}}
redis.register_function('pkb_limit_take', limit_take)
redis.register_function('pkb_limit_block', limit_block)
redis.register_function{function_name = 'pkb_limit_closed', callback = limit_closed, flags = {'no-writes'}}
redis.register_function('pkb_migrate', migrate)
