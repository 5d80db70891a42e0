"""The one error of this package."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written. One sentence that names the file and what is wrong in it."""
