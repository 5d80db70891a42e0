"""What every test can rely on."""

import os

# As `server.cli` does, and for the same reason: tests share their machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
