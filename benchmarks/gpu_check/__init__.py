"""The first check on a machine with a GPU: correctness, speed, and where the time goes.

`python -m benchmarks.gpu_check` runs its parts one after another, each in its own process with its own time limit, and
writes one JSON file and one Markdown report after every part. An interrupted run continues where it stopped.
"""
