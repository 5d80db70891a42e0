"""What to run first on a machine with a GPU: is it right, how fast is it, where does the time go.

`python -m benchmarks.gpu_check` runs its parts one after another, each in a process of its own with a limit of its own,
and writes one JSON file and one Markdown report after every part. A run that is cut goes on where it was.
"""
