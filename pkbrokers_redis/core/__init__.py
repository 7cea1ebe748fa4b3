"""Decides: candles, sessions, keys. No I/O, no clock, no logs. Begin with `candles.py`, the rules."""
