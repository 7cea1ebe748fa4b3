"""One file a group of routes; `registry.NAMES` lists them."""
