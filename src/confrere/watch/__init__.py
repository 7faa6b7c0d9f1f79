"""What a run is doing, for those who look after it: status, live page, metrics, structured log.

Everything but the log is read from the run directory, so it works beside the process that trains, after it, and for
runs in one process as for runs across hospitals. Nothing here can change a run.
"""
