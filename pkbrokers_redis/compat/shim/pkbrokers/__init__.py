"""Precede an installed PKBrokers when PYTHONPATH names this folder, and delegate to `compat`."""

import importlib
import sys

del sys.modules[__name__]  # the package that `compat` creates replaces this one
importlib.import_module("pkbrokers_redis.compat")
importlib.import_module("pkbrokers")
