"""`python -m train --config configs/x.py [--optim.lr 1e-6 ...]`: trains a model with DAPO.

`python -m train report RUN [RUN ...]` draws and tabulates what runs have logged.
"""

import sys

from rlvr_jax.program import run_program

if __name__ == "__main__":
    if sys.argv[1:2] == ["report"]:
        from train import report

        sys.exit(run_program(lambda argv: report.prepare(argv[1:]), report.run))
    from train.loop import run
    from train.prepare import prepare

    sys.exit(run_program(prepare, run))
