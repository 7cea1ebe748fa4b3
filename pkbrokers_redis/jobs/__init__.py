"""What RQ carries out. `schedule.py` is the trading day, `core/jobs.py` the table of jobs."""
