"""Speaks Kite: packets (`layout.py`, `wire.py`), websocket (`socket.py`), login, REST, history."""
