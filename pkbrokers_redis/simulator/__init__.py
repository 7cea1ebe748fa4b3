"""A Kite on loopback that the official clients take for the real one: `kite.py` puts it together."""
