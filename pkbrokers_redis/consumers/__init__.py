"""What other programs import: `store.py` reads, `follow.py` follows, `mirror.py` copies."""
