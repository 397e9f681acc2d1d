"""`python -m train --config configs/x.py [--optim.lr 1e-6 ...]`: trains a model with DAPO.

With `--dry-run` it only checks the files and prints what the run would be and take; no device is used.
"""

import sys

from rlvr_jax.program import run_program
from train.dry_run import FLAG, dry_run
from train.loop import run
from train.prepare import prepare

if __name__ == "__main__":
    if FLAG in sys.argv[1:]:
        sys.exit(run_program(dry_run, lambda _: None))
    sys.exit(run_program(prepare, run))
