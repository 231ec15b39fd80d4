"""`python -m lightning_moevlm` is `moevlm`."""

import sys

from lightning_moevlm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
