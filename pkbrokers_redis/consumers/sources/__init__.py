"""Where `InstrumentDataManager` gets candles from: one file a source, one row each in `table.py`."""
