"""Updates that were skipped because they were not finite: the count, and the batch kept for whoever looks into it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlvr_jax.runs.files import atomic_path, write_json

STOP_AFTER = 3


@dataclasses.dataclass(frozen=True)
class Skips:
    """Skipped updates: how many of the newest ones in a row, over trainer steps too, and how many in all."""

    in_a_row: int = 0
    total: int = 0

    def after(self, skipped: Sequence[bool] | np.ndarray) -> tuple["Skips", int | None]:
        """The count after a trainer step, and its mini-batch that was skipped as the third in a row, if there is one.

        Args:
          skipped: of each mini-batch of the step, in order.
        """
        row, stop = self.in_a_row, None
        for number, was_skipped in enumerate(skipped):
            row = row + 1 if was_skipped else 0
            if row == STOP_AFTER and stop is None:
                stop = number
        return Skips(row, self.total + int(np.sum(skipped))), stop


def save_bad_batch(
    folder: Path, trainer_step: int, arrays: dict[str, np.ndarray], last: int, rows: Sequence[dict[str, Any]]
) -> Path:
    """Writes bad_batch_step_N.npz, the arrays of the mini-batches before and at `last`, and .json, who their rows are.

    Args:
      arrays: of the trainer step, with N rows each; `mini_batch_N` has the number of each row's mini-batch.
      last: number of the mini-batch that was skipped as the third in a row. Those of an earlier trainer step are gone.
      rows: of each of the N rows that is a response, what the JSON says of it; padding rows come last and have none.

    Returns:
      The path of the arrays.
    """
    number_N = arrays["mini_batch_N"]
    chosen = np.flatnonzero((number_N > last - STOP_AFTER) & (number_N <= last) & (number_N >= 0))
    path = folder / f"bad_batch_step_{trainer_step:06d}.npz"
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **{name: x[chosen] for name, x in arrays.items()})  # type: ignore[arg-type]
    finite = {name: np.isfinite(x).reshape(len(x), -1).min(axis=1) for name, x in arrays.items()}
    said = []
    for place, row in enumerate(chosen.tolist()):
        bad = [name for name, fine_N in finite.items() if not fine_N[row]]
        at = {"row": place, "mini_batch": int(number_N[row])}
        said.append(at | (rows[row] if row < len(rows) else {"padding": True}) | {"not_finite": bad})
    write_json(path.with_suffix(".json"), {"trainer_step": trainer_step, "rows": said})
    return path
