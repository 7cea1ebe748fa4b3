"""Where `InstrumentDataManager` gets candles from: one file per source, one row each in `table.py`."""
