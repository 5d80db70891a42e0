"""Finds models/nano, the model that comes with fastblt.

A path beside this package, and not importlib.resources: the engine's process maps the weights from a folder, and
packages are installed as folders. `hatch_build.py` puts the model's files into a wheel.
"""

from pathlib import Path

NAME = "nano"


def embedded_model(package: Path = Path(__file__).parent) -> Path:
    """The folder: inside the package where a wheel was installed, else that of the checkout around the package."""
    installed = package / "models" / NAME
    return installed if installed.is_dir() else package.parent / "models" / NAME
