"""The account of a decoding run: one record a setting, differences between settings, as JSON, CSV and text."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from decode.config import Setting, unmarked
from decode.results.files import Row, Timing
from decode.results.tables import settings_text
from rlvr_jax.evaluation import avg_per_problem, maj_per_problem, mean_interval, pass_per_problem
from rlvr_jax.runs.files import atomic_path, write_json

# The entries that differ between two equal runs: speed, and what depends on slots and blocks.
TIMINGS = ("seconds", "tokens_per_second", "sampled_passes_per_token", "other_passes_per_token")
METRICS = ("avg_at_k", "pass_at_k", "maj_at_k")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one setting's responses came to: per-problem values of the metrics of the first grader, and its record.

    `problems` are the indices of the problems, `values[metric]` numbers in their order, at the largest k.
    """

    setting: Setting
    problems: tuple[int, ...]
    values: dict[str, np.ndarray]
    record: dict[str, Any]


def summarise(
    setting: Setting,
    rows: Sequence[dict[tuple[int, int], Row]],
    problems: Sequence[int],
    n: int,
    timings: Sequence[Timing] = (),
    *,
    graders: Sequence[str] = ("math_verify",),
    tau: float | None = None,
) -> Outcome:
    """Outcome of one finished setting.

    `rows` holds one dictionary a seed, each with samples 0..n-1 of every problem; together they are the k = seeds x n
    samples of Avg@k, Pass@k and maj@k. Every interval is the 95% `mean_interval` over problems, None where a single
    problem says nothing of others. `share_selected` is the share of emitted tokens where the criterion fired,
    `share_changed` that of tokens that differ from the one proposed. Lengths and tokens include the stop token.
    `tokens_per_second` leaves out what was written after a compilation, unless there is nothing else. `tau` is the
    threshold in use where the setting gives a share.
    """
    table = [[seed_rows[problem, sample] for seed_rows in rows for sample in range(n)] for problem in problems]
    flat = [row for samples in table for row in samples]
    tokens = sum(row.length for row in flat)
    graded = {name: _graded(table, None if i == 0 else name) for i, name in enumerate(graders)}
    first, values = graded[graders[0]]
    warm = [timing for timing in timings if not timing.compiled] or list(timings)
    warm_seconds = sum(timing.seconds for timing in warm)
    passed = sum(timing.tokens for timing in timings)
    record = {
        "setting": setting.name,
        "role": setting.role,
        "control_of": list(setting.control_of),
        "model": setting.model,
        "criterion": setting.criterion,
        "tau": setting.tau if tau is None else tau,
        "share_wanted": setting.share,
        "gamma": setting.gamma if setting.model == "pair" else None,
        "sample_from": setting.sample_from if setting.model == "pair" else None,
        "temperature": setting.temperature,
        "top_p": setting.top_p,
        "top_k": setting.top_k,
        "top_logprobs": setting.top_logprobs,
        "problems": len(table),
        "k": len(table[0]),
        "grader": graders[0],
        **first,
        "share_selected": sum(len(row.fired) for row in flat) / max(tokens, 1),
        "share_changed": sum(_changed(row) for row in flat) / max(tokens, 1),
        "tokens": tokens,
        "mean_length": tokens / len(flat),
        "share_finished": sum(row.finished for row in flat) / len(flat),
        "invalid": sum(row.invalid for row in flat),
        "seconds": sum(timing.seconds for timing in timings),
        "tokens_per_second": sum(timing.tokens for timing in warm) / warm_seconds if warm_seconds else 0.0,
        "sampled_passes_per_token": sum(timing.sampled_passes for timing in timings) / max(passed, 1),
        "other_passes_per_token": sum(timing.other_passes for timing in timings) / max(passed, 1),
        "graders": {name: record for name, (record, _) in graded.items()},
    }
    return Outcome(setting, tuple(problems), values, record)


def _graded(table: list[list[Row]], other: str | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One grader's metrics with their intervals, and their values a problem; `other` None: the first grader."""
    verdicts = [
        [(row.correct, row.prediction, row.error) if other is None else row.others[other] for row in samples]
        for samples in table
    ]
    correct = np.array([[verdict[0] for verdict in samples] for samples in verdicts], dtype=bool)
    predictions = [[verdict[1] for verdict in samples] for samples in verdicts]
    k = correct.shape[1]
    powers = [2**i for i in range(k.bit_length()) if 2**i < k] + [k]
    passed = {power: pass_per_problem(correct, power) for power in powers}
    values = {
        "avg_at_k": avg_per_problem(correct, k),
        "pass_at_k": passed[k],
        "maj_at_k": maj_per_problem(correct, predictions, k),
    }
    record = {
        "avg_at_k": float(values["avg_at_k"].mean()),
        "interval": mean_interval(values["avg_at_k"]).ends,
        "pass_at_k": {str(power): float(x.mean()) for power, x in passed.items()},
        "pass_intervals": {str(power): mean_interval(x).ends for power, x in passed.items()},
        "maj_at_k": float(values["maj_at_k"].mean()),
        "maj_interval": mean_interval(values["maj_at_k"]).ends,
        "grading_errors": sum(verdict[2] is not None for samples in verdicts for verdict in samples),
    }
    return record, values


def _changed(row: Row) -> int:
    return sum(original != emitted for original, emitted in zip(row.original, row.resampled, strict=True))


# ---- settings against one another ----------------------------------------------------------------------------------


def difference(one: Outcome, other: Outcome) -> dict[str, Any]:
    """one - other over the problems that both have, for each metric: the mean and its 95% interval, paired.

    Pass@k and maj@k grow with k, so only settings of one k are compared by them.
    """
    place_in = [{problem: place for place, problem in enumerate(outcome.problems)} for outcome in (one, other)]
    common = sorted(place_in[0].keys() & place_in[1].keys())
    places = [[place[problem] for problem in common] for place in place_in]
    out: dict[str, Any] = {"against": other.setting.name, "problems": len(common)}
    metrics = METRICS if one.record["k"] == other.record["k"] else METRICS[:1]
    for metric in metrics if common else ():
        values = one.values[metric][places[0]] - other.values[metric][places[1]]
        out[metric] = {"difference": float(values.mean()), "interval": mean_interval(values, bounds=(-1.0, 1.0)).ends}
    return out


def alone(setting: Setting) -> str | None:
    """base or rl where one model alone makes the tokens, else None."""
    if setting.model == "pair":
        return setting.sample_from if setting.criterion == "none" else None
    return setting.model


def references(one: Outcome, among: Sequence[Outcome]) -> dict[str, Outcome]:
    """What a setting is compared with: rl and base alone as they are sampled in it, and the same at gamma = 0.

    Of several that match, the first of `among` is taken; where none matches, there is none. A model alone, which is
    there as a control, is compared with the models as the settings of the pair sample them, if they all agree.
    """
    sampling = sampling_of(one.setting)
    if alone(one.setting) is not None:
        of_pair = {sampling_of(other.setting) for other in among if alone(other.setting) is None}
        sampling = of_pair.pop() if len(of_pair) == 1 else sampling
    found: dict[str, Outcome] = {}
    for other in among:
        role = alone(other.setting)
        if role is not None and sampling_of(other.setting) == sampling:
            found.setdefault(role, other)
        if unmarked(other.setting) == unmarked(dataclasses.replace(one.setting, gamma=0.0)):
            found.setdefault("gamma0", other)
    return {role: other for role, other in found.items() if other is not one}


def sampling_of(setting: Setting) -> tuple[float, float, int]:
    """How a setting samples: temperature, top_p and top_k."""
    return setting.temperature, setting.top_p, setting.top_k


def with_differences(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The records, each with `differences`: by rl, base and gamma0, where those settings are there."""
    return [
        outcome.record
        | {"differences": {role: difference(outcome, other) for role, other in references(outcome, outcomes).items()}}
        for outcome in outcomes
    ]


def remarks(records: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences on responses that count as wrong for another reason than their answer."""
    lines = []
    for record in records:
        of = f"of {record['problems'] * record['k']} responses"
        if record["invalid"]:
            lines.append(
                f"{record['setting']}: {record['invalid']} {of} ended on logits that were not finite and count as wrong"
            )
        if record["grading_errors"] > record["invalid"]:  # which have an error, too
            lines.append(
                f"{record['setting']}: {record['grading_errors'] - record['invalid']} {of} could not be graded "
                "(error in seedN.rows.jsonl says why) and count as wrong"
            )
    return lines


# ---- as files ------------------------------------------------------------------------------------------------------


def write_summaries(folder: Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes summary.json, a list with one record per setting, and the same flat: summary.csv, summary.txt to read."""
    write_json(folder / "summary.json", list(records))
    write_csv(folder / "summary.csv", records)
    write_table(folder / "summary.txt", records)


def write_table(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """The records as a table with all its rows and columns."""
    with atomic_path(path) as temporary:
        temporary.write_text(settings_text(records), encoding="utf-8")


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """The records with what is nested in them spread over columns."""
    flat = [_flat(record) for record in records]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for record in flat for key in record)))
    writer.writeheader()
    writer.writerows(flat)
    with atomic_path(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested objects as columns `a.b`, intervals as `_low` and `_high`, lists of names with spaces between."""
    out: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        elif "interval" in f"{prefix}{key}":
            out[f"{prefix}{key}_low"], out[f"{prefix}{key}_high"] = value or ("", "")
        else:
            out[f"{prefix}{key}"] = " ".join(map(str, value)) if isinstance(value, list) else value
    return out
