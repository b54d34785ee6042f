"""`python -m megascale VERB ...`, the same as `megascale VERB ...`; also under torchrun."""

import sys

from megascale.cli import main

if __name__ == "__main__":
    sys.exit(main())
