"""What RQ carries out. `schedule.py` is the trading day, `store/job_names.py` the table of jobs."""
