"""Batch decoding with one model or two: `python -m decode --config configs/decode_dapo_32b.py`.

Without a recipe:
`python -m decode --base B --rl R --problems P.parquet --criterion delta_logp --tau -0.3 --gamma 0.05 --n 4`; a sweep:
`python -m decode --base B --rl R --problems P.parquet --grid.criteria delta_logp kl --match-rate 0.05 0.1`.
With `--plan v6e:4x4` its programs are compiled for that topology, and what they would take there is printed.
The same command resumes where a killed run stopped. All flags: `python -m decode --help`.

`python -m decode compare RUN RUN ...` tabulates and draws what runs have found.
`python -m decode diagnose --base B --rl R --responses FILE` shows an update token by token; see `decode.diagnose.run`.
"""

import sys

from decode.check import compiled
from decode.diagnose import run as diagnose
from decode.results import compare
from decode.run import prepare, run
from rlvr_jax.planning import command
from rlvr_jax.runs.program import run_program

if __name__ == "__main__":
    if sys.argv[1:2] == ["compare"]:
        sys.exit(run_program(lambda argv: compare.prepare(argv[1:]), compare.run))
    if sys.argv[1:2] == ["diagnose"]:
        sys.exit(run_program(lambda argv: diagnose.prepare(argv[1:]), diagnose.run))
    if command.FLAG in sys.argv[1:]:
        sys.exit(run_program(compiled.prepare, compiled.plan))
    sys.exit(run_program(prepare, run))
