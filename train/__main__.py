"""`python -m train --config configs/x.py [--optim.lr 1e-6 ...]`: trains a model with DAPO."""

import sys

from rlvr_jax.program import run_program
from train.loop import run
from train.prepare import prepare

if __name__ == "__main__":
    sys.exit(run_program(prepare, run))
