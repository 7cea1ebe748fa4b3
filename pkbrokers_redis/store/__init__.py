"""Knows Redis: connecting, streams, rows, leases, the atomic commit. Key names are in `keys.py`."""
