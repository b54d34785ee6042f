"""`python -m benchmarks {step,axes} [options]`."""

import sys

from benchmarks import axes, step

TABLES = {"step": step.main, "axes": axes.main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TABLES:
        sys.exit(f"usage: python -m benchmarks {{{','.join(TABLES)}}} [options]")
    TABLES[sys.argv[1]](sys.argv[2:])
