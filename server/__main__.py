"""`python -m server` is `fastblt`."""

from .cli import main

main()
