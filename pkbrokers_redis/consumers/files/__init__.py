"""Files that other programs read and write: pickles, ticks.json, Parquet, and their manifest."""
