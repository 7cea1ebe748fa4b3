"""Runs the roles: `ingest.py` turns sockets into streams, `aggregate.py` streams into candles."""
