"""The jobs that RQ runs. `cron.py` is the trading day, `store/queue.py` the table of jobs."""
