"""Found in front of an installed PKBrokers when PYTHONPATH names this folder: hands over to `compat`."""

import importlib
import sys

del sys.modules[__name__]  # the package that `compat` makes takes this one's place
importlib.import_module("pkbrokers_redis.compat")
importlib.import_module("pkbrokers")
