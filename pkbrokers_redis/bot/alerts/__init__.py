"""Alerts: evaluated from the tick streams, kept in Redis, each crossing told once.

model    what an alert is, how it is written in a chat and in Redis
rules    price, volume, day high and low: when does it fire (pure)
book     adding, listing, removing
commit   one step in Redis: position, what alerts remember, messages
worker   the reader of the streams
outbox   from Redis to Telegram
"""
