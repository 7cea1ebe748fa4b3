"""Alerts: evaluated from the tick streams, stored in Redis, one message for each crossing.

rules    what an alert is, how people type it, and when it fires (pure)
store    alerts, their state and the messages in Redis, changed in one transaction
worker   the thread that reads the streams
outbox   from Redis to Telegram
"""
