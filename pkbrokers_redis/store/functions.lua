#!lua name=pkbrokers

--[[ The one place that writes candles: everything of a batch and shard in one call, or nothing. And the leases
that say who may.

P:{S}:cursor   hash    id, read (entries), repair, commits, epoch, owner, src:<id> → last seq
P:{S}:lease    string  the owner's id, PX
P:{S}:ticks    stream  its group `aggregator` carries the committed position
P:{S}:state    hash    token → what the aggregator remembers beside the rows
P:{S}:closed   stream  announced candles
P:{S}:repairs  stream  what `repair` in the cursor is an id of; only looked at
and, under the same hash tag, ARGV "base" .. : current:<token>, candles:<token>:<interval>; quote:<token> goes
with an instrument that is forgotten.

A command on a key that somebody filled with another type fails alone: the key's name is returned,
everything else is written. ]]

local GROUP = 'aggregator'
local CHUNK = 1000 -- arguments of one call; Lua's stack ends at about 8,000
local FORGET_MS = 600000 -- who was silent for ten minutes leaves the list of workers

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
  local rows, after = redis.call('LRANGE', key, 0, -1), nil
  for n = #rows, 1, -1 do -- rows of a foreign hand start at 0: passed over
    local other = start_of(rows[n])
    if other == start then
      redis.call('LSET', key, n - 1, row)
      return
    elseif other > start then
      after = rows[n]
    elseif other > 0 then
      if after then
        redis.call('LINSERT', key, 'BEFORE', after, row)
      else
        redis.call('RPUSH', key, row)
      end
      redis.call('LTRIM', key, -keep, -1)
      return
    end
  end
  if #rows < tonumber(keep) then redis.call('LPUSH', key, row) end
end

-- Replace a whole list.
local function replace(bad, key, args, from, to)
  local _, err = try(bad, key, 'LTRIM', key, 1, 0) -- empties a list, and refuses what is none
  while from <= to and not err do
    local last = math.min(from + CHUNK - 1, to)
    redis.call('RPUSH', key, unpack(args, from, last))
    from = last + 1
  end
end

local function hset_all(bad, key, args, from, to)
  while from <= to do
    local last = math.min(from + CHUNK - 1, to)
    try(bad, key, 'HSET', key, unpack(args, from, last))
    from = last + 1
  end
end

local function comes_after(id, other)
  local ms, seq = string.match(id, '^(%d+)-(%d+)')
  local other_ms, other_seq = string.match(other, '^(%d+)-(%d+)')
  if ms ~= other_ms then return tonumber(ms) > tonumber(other_ms) end
  return tonumber(seq) > tonumber(other_seq)
end

-- Whether this stream never had the entry: we read it from a Redis that has gone (a replica that lagged
-- took its place). One that the hard cap cut off since is older than the first that is left.
local function never_had(ticks, id)
  local found = redis.pcall('XRANGE', ticks, id, id)
  if found.err or #found > 0 then return false end
  local first = redis.call('XRANGE', ticks, '-', '+', 'COUNT', 1)[1]
  return not first or comes_after(id, first[1])
end

-- XINFO's lag is entries added minus entries read; what the hard cap cut off, or went with a stream that was
-- deleted, is neither. When nothing is left behind `id`, the group has read all there is.
local function mend_lag(ticks, id, read)
  local groups = redis.pcall('XINFO', 'GROUPS', ticks)
  for _, group in ipairs(groups.err and {} or groups) do
    local name, lag = group[2], group[12]
    if name == GROUP and lag and lag ~= 0 and #redis.call('XRANGE', ticks, '(' .. id, '+', 'COUNT', 1) == 0 then
      redis.call('XGROUP', 'SETID', ticks, GROUP, id, 'ENTRIESREAD', read + lag)
    end
  end
end

--[[ KEYS cursor, ticks, state, closed. ARGV: base, owner, epoch, commits so far, id we left in the cursor, id to
leave there, entries read so far, cap of closed, id of the last repair in this commit ('' for none), then counted
sections: sources (src seq), sources to forget (src), currents (token n (interval row)×n), drops (token interval),
lists (token interval n row×n: all there is from now on), puts (token interval start keep row), closed (token
symbol interval row rev), state (field value), instruments to forget (token n interval×n).
Returns the names of keys that refused. Refuses itself with FENCED when another owns the shard, and with STALE
when Redis is not as we left it: then what we know of the shard must be loaded again. ]]
local function commit(keys, args)
  local cursor, ticks, state, closed = keys[1], keys[2], keys[3], keys[4]
  local base, owner, epoch, commits = args[1], args[2], args[3], args[4]
  local was, id, read, cap, repair = args[5], args[6], args[7], args[8], args[9]
  local held = redis.call('HMGET', cursor, 'owner', 'epoch', 'commits', 'id')
  local held_epoch = tonumber(held[2] or '0') or 0
  if held_epoch < tonumber(epoch) then -- no other owner: the data went back (flushed, or an older copy)
    return redis.error_reply('STALE the shard is in epoch ' .. held_epoch .. ', not ' .. epoch)
  end
  if held_epoch > tonumber(epoch) or held[1] ~= owner then
    return redis.error_reply('FENCED ' .. (held[1] or 'nobody') .. ' owns the shard in epoch ' .. held_epoch
      .. ', this is ' .. owner .. ' of epoch ' .. epoch)
  end
  if (held[3] or '0') ~= commits or (held[4] or '0-0') ~= was then
    return redis.error_reply('STALE the cursor is at commit ' .. (held[3] or '0') .. ', ' .. (held[4] or '0-0')
      .. ', not at ' .. commits .. ', ' .. was)
  end
  if id ~= was and never_had(ticks, id) then
    return redis.error_reply('STALE the stream never had entry ' .. id)
  end
  if repair ~= '' and never_had(base .. 'repairs', repair) then
    return redis.error_reply('STALE the repairs never had entry ' .. repair)
  end
  local bad = {}
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
    try(bad, key, 'HSET', key, unpack(args, i + 2, i + 1 + pairs_n))
    i = i + 2 + pairs_n
  end
  for _ = 1, count() do
    local key = base .. 'current:' .. args[i]
    try(bad, key, 'HDEL', key, args[i + 1])
    i = i + 2
  end
  for _ = 1, count() do
    local key, rows = base .. 'candles:' .. args[i] .. ':' .. args[i + 1], tonumber(args[i + 2])
    replace(bad, key, args, i + 3, i + 2 + rows)
    i = i + 3 + rows
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
  i = i + fields
  for _ = 1, args[i] and count() or 0 do -- a worker of an older release has no such section
    local token, names = args[i], tonumber(args[i + 1])
    try(bad, state, 'HDEL', state, token, token .. ':candles', token .. ':revs')
    for _, key in ipairs({base .. 'current:' .. token, base .. 'quote:' .. token}) do
      try(bad, key, 'DEL', key)
    end
    for name = i + 2, i + 1 + names do
      redis.call('DEL', base .. 'candles:' .. token .. ':' .. args[name])
    end
    i = i + 2 + names
  end

  redis.call('HSET', cursor, 'id', id, 'read', read, 'commits', tonumber(commits) + 1)
  if repair ~= '' then redis.call('HSET', cursor, 'repair', repair) end
  if id ~= was then
    local _, err = try({}, ticks, 'XGROUP', 'SETID', ticks, GROUP, id, 'ENTRIESREAD', read)
    if err then
      try(bad, ticks, 'XGROUP', 'CREATE', ticks, GROUP, id, 'MKSTREAM', 'ENTRIESREAD', read)
    end
    mend_lag(ticks, id, read)
  end
  return bad
end

--[[ Own a shard. KEYS cursor, lease; ARGV owner, ttl in ms. Returns the epoch to commit with: a new one when
the lease was free (whoever held a lower one cannot commit any more), ours when it is ours already, and 0
when it is another's. ]]
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

-- Take or renew a plain lease. KEYS lease; ARGV owner, ttl in ms. Returns 1, or 0 when another holds it.
local function hold(keys, args)
  local holder = redis.call('GET', keys[1])
  if holder and holder ~= args[1] then return 0 end
  redis.call('SET', keys[1], args[1], 'PX', args[2])
  return 1
end

-- Let go of a lease of either kind. KEYS lease; ARGV owner. Returns 1, or 0 when it was not ours.
local function release(keys, args)
  if redis.call('GET', keys[1]) ~= args[1] then return 0 end
  return redis.call('DEL', keys[1])
end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Say that a worker lives. KEYS workers; ARGV `<role> <id>`.
local function announce(keys, args)
  local now = now_ms()
  redis.call('ZADD', keys[1], now, args[1])
  redis.call('ZREMRANGEBYSCORE', keys[1], '-inf', now - FORGET_MS)
  return now
end

-- The ids of a role's living workers. KEYS workers; ARGV role, how fresh a sign of life must be in ms.
local function members(keys, args)
  local ids, role = {}, args[1] .. ' '
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', keys[1], now_ms() - args[2], '+inf')) do
    if string.sub(member, 1, #role) == role then ids[#ids + 1] = string.sub(member, #role + 1) end
  end
  return ids
end

redis.register_function('pkb_commit', commit)
redis.register_function('pkb_lease', lease)
redis.register_function('pkb_hold', hold)
redis.register_function('pkb_release', release)
redis.register_function('pkb_announce', announce)
redis.register_function{function_name = 'pkb_members', callback = members, flags = {'no-writes'}}
