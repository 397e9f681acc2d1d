"""`python -m train --config configs/x.py [--optim.lr 1e-6 ...]`: trains a model with DAPO.

With `--dry-run` it only checks the files and prints what the run would be and take; no device is used.
With `--plan v5p:4x4x4` its programs are compiled for that topology, and what they would take there is printed.
`python -m train report RUN [RUN ...]` draws and tabulates what runs have logged.
"""

import sys

from rlvr_jax.planning import command
from rlvr_jax.runs.program import run_program
from train.check import plan
from train.check.dry_run import FLAG, dry_run

if __name__ == "__main__":
    if sys.argv[1:2] == ["report"]:
        from train.records import report

        sys.exit(run_program(lambda argv: report.prepare(argv[1:]), report.run))
    if FLAG in sys.argv[1:]:
        sys.exit(run_program(dry_run, lambda _: None))
    if command.FLAG in sys.argv[1:]:
        sys.exit(run_program(plan.prepare, plan.plan))
    from train.check.prepare import prepare
    from train.run.loop import run

    sys.exit(run_program(prepare, run))
