"""The command `pkb`: one file per command, the table is `main.py`; they share `output.py` and `reader.py`."""
