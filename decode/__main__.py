"""Batch decoding with one model or two: `python -m decode --config configs/decode_dapo_32b.py`.

Without a recipe:
`python -m decode --base B --rl R --problems P.parquet --criterion delta_logp --tau -0.3 --gamma 0.05 --n 4`.
The same command again goes on where a killed run stopped. All flags: `python -m decode --help`.
"""

import sys

from decode.run import prepare, run
from rlvr_jax.program import run_program

if __name__ == "__main__":
    sys.exit(run_program(prepare, run))
