"""`python -m megascale VERB ...`, the same as `megascale VERB ...`; also under torchrun."""

from megascale.cli import leave, main

if __name__ == "__main__":
    leave(main())
