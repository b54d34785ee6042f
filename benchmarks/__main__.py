"""`python -m benchmarks step [options]`."""

import sys

from benchmarks import step

TABLES = {"step": step.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TABLES:
        sys.exit(f"usage: python -m benchmarks {{{','.join(TABLES)}}} [options]")
    TABLES[sys.argv[1]](sys.argv[2:])
