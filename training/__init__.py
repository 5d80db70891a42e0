import time

STARTED = time.monotonic()
"""When this process began, near enough: a stage is counted from here, and what comes next is the import of torch."""
