import time

STARTED = time.monotonic()
"""About when this process started: a stage's time counts from here, before torch is imported."""
