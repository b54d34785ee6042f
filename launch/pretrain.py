"""Train a config: `deepspeed launch/pretrain.py --config FILE [a.b=c ...]`, also under torchrun, srun and plain python."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works without an installation

from megascale.cli import leave, main

if __name__ == "__main__":
    leave(main(["train", *sys.argv[1:]]))
