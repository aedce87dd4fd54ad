"""`python -m subspace_lab` is the same program as the console script `subspace-lab`."""

from __future__ import annotations

import sys

from subspace_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
