"""One file per command; `registry.NAMES` is their table. docs/adding.md shows a new one in ten lines."""
