"""Thresholds for wanted shares of selected tokens: found once for a run, kept in its calibration.json, used from there.

Responses are drawn from the sampled model alone, with the setting's temperature and nucleus; both models score them
token by token; tau is a quantile of the criterion's values. In decoding the share differs a little, since a token that
was drawn again changes what follows it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from decode.check.inputs import Inputs
from decode.config import DecodeConfig, Setting
from decode.draw import Models, Wanted, draw
from decode.results.files import read_record
from decode.results.parts import JsonLines, checksum
from decode.results.progress import DecodeProgress
from rlvr_jax.criteria import criterion_of, threshold_for_share
from rlvr_jax.runs.distributed import cluster
from rlvr_jax.runs.files import write_json
from rlvr_jax.runs.program import RunError
from rlvr_jax.scoring import criterion_values

SEED = 1 << 63  # of the calibration responses: not one that a run's own seeds would be
KEYS = ("criterion", "sample_from", "share", "top_logprobs", "temperature", "top_p", "top_k")


def known_thresholds(folder: Path, settings: Sequence[Setting]) -> dict[str, float]:
    """tau by the name of the setting, of those whose threshold was found earlier in this folder of process 0."""
    return cluster().broadcast(_found(folder, settings))


def _found(folder: Path, settings: Sequence[Setting]) -> dict[str, float]:
    found = {tuple(entry[key] for key in KEYS): entry["tau"] for entry in _read(folder)["thresholds"]}
    return {s.name: found[_key(s)] for s in settings if s.share is not None and _key(s) in found}


def calibrate(
    folder: Path,
    config: DecodeConfig,
    inputs: Inputs,
    models: Models,
    mesh: Mesh | None,
    slots: int,
    progress: DecodeProgress,
    interruptible: Callable[[str], None] = lambda phase: None,
) -> dict[str, float]:
    """tau by the name of the setting, for all settings that give a share. What calibration.json has is never changed.

    Responses that a killed run drew for this are used again. Of several processes, number 0 reads and writes the files.
    `interruptible` is told what is done, and may raise.
    """
    known = known_thresholds(folder, config.settings)
    missing = [s for s in config.settings if s.share is not None and s.name not in known]
    passes: dict[Setting, list[Setting]] = {}
    for setting in missing:
        passes.setdefault(_sampled_alone(setting), []).append(setting)
    for sampled, settings in passes.items():
        values: dict[tuple[str, int | None], np.ndarray] = {}
        measured = [setting for setting in settings if criterion_of(setting.criterion or "").measures]
        responses: list[tuple[int, list[int]]] = []
        if measured:
            progress.say(
                f"calibration: {config.calibration.responses} responses of {sampled.model} at temperature "
                f"{sampled.temperature:g}, top-p {sampled.top_p:g}"
            )
            responses = _responses(folder, config, inputs, models, sampled, mesh, slots, interruptible)
            interruptible("calibrate")
        for top_logprobs in dict.fromkeys(setting.top_logprobs for setting in measured):
            names = dict.fromkeys(s.criterion or "" for s in measured if s.top_logprobs == top_logprobs)
            found = criterion_values(
                *(models["base"].config, models["base"].params, models["rl"].config, models["rl"].params),
                [inputs.prompts[place] for place, _ in responses],
                [tokens for _, tokens in responses],
                list(names),
                top_logprobs=top_logprobs,
                sample_from=settings[0].sample_from,
                cache_dtype=None if config.cache_dtype == "model" else config.cache_dtype,
                mesh=mesh,
            )
            for name, rows in found.items():
                values[name, top_logprobs] = _numbers(name, rows, progress)
        entries = []
        for setting in settings:
            value_N = values.get((setting.criterion or "", setting.top_logprobs), np.zeros(0))
            threshold = threshold_for_share(setting.criterion or "", value_N, setting.share or 0.0)
            entry = dict(zip(KEYS, _key(setting), strict=True)) | threshold._asdict() | {"tokens": int(value_N.size)}
            if entry not in entries:
                entries.append(entry)
                progress.say(_said(entry))
        if not cluster().main:
            continue
        before = _read(folder)
        before["thresholds"] += entries
        if responses:
            before["passes"].append(_account(config, sampled, responses))
        write_json(folder / "calibration.json", before | {"crc32": checksum(before)})
    return known_thresholds(folder, config.settings)


def _numbers(criterion: str, rows: Sequence[np.ndarray], progress: DecodeProgress) -> np.ndarray:
    """Values of all tokens but those where a model's logits are not finite: a decode would end there."""
    values_N = np.concatenate(rows)
    there_N = values_N[~np.isnan(values_N)]
    if not there_N.size:
        raise RunError(
            f"calibration: no token of {len(rows)} responses has a {criterion}: a model's logits are not finite"
        )
    if there_N.size < values_N.size:
        progress.say(
            f"  {criterion}: {values_N.size - there_N.size} tokens are left out, a model's logits are not finite there"
        )
    return there_N


def _responses(
    folder: Path,
    config: DecodeConfig,
    inputs: Inputs,
    models: Models,
    sampled: Setting,
    mesh: Mesh | None,
    slots: int,
    interruptible: Callable[[str], None],
) -> list[tuple[int, list[int]]]:
    """(place of the problem, token ids) of every calibration response; those that are not on disk are drawn."""
    file = JsonLines(folder / "calibration" / f"{sampled.name}.jsonl")
    place_of = {problem.index: place for place, problem in enumerate(inputs.problems)}
    drawn = file.read(lambda one: (one["problem"], one["sample"], one["tokens"])) if cluster().main else []
    found = {(place_of[problem], sample): ids for problem, sample, ids in drawn if problem in place_of}
    keys, tokens = cluster().broadcast([list(key) for key in found]), cluster().broadcast_tokens(list(found.values()))
    there = {(place, sample): ids for (place, sample), ids in zip(keys, tokens, strict=True)}
    spread = _spread(config.calibration.responses, len(inputs.problems))
    wanted = [Wanted(place, sample, SEED) for place, sample in spread if (place, sample) not in there]
    longest = config.calibration.max_new_tokens
    drawn = draw(
        *(models, config, inputs, [(sampled, wanted)]),
        slots=slots,
        mesh=mesh,
        on_chunk=lambda rows, tokens: interruptible(f"calibrate, {rows} responses have ended"),
        max_new_tokens=longest,
    )
    for _, one in drawn:
        if cluster().main:
            file.append([{"problem": one.problem, "sample": one.sample, "tokens": one.tokens.tolist()}])
        there[one.place, one.sample] = one.tokens.tolist()
    return [(place, there[place, sample]) for place, sample in spread]


def _spread(count: int, problems: int) -> list[tuple[int, int]]:
    """(place of the problem, sample) of so many responses, over all problems as evenly as can be."""
    if count < problems:
        return [(i * problems // count, 0) for i in range(count)]
    return sorted((i % problems, i // problems) for i in range(count))


def _sampled_alone(setting: Setting) -> Setting:
    """The model that a setting samples from, alone."""
    alone = Setting(
        model=setting.sample_from, temperature=setting.temperature, top_p=setting.top_p, top_k=setting.top_k
    )
    name = f"{alone.model}_t{alone.temperature:g}_p{alone.top_p:g}" + (f"_k{alone.top_k}" if alone.top_k else "")
    return dataclasses.replace(alone, name=name)


def _account(config: DecodeConfig, sampled: Setting, responses: list[tuple[int, list[int]]]) -> dict[str, Any]:
    return {
        "sampled": sampled.model,
        "temperature": sampled.temperature,
        "top_p": sampled.top_p,
        "top_k": sampled.top_k,
        "seed": SEED,
        "responses": len(responses),
        "problems": len({place for place, _ in responses}),
        "tokens": sum(len(tokens) for _, tokens in responses),
        "max_new_tokens": config.calibration.max_new_tokens or config.max_new_tokens,
    }


def _said(entry: dict[str, Any]) -> str:
    line = f"  {entry['criterion']} at {100 * entry['share']:g}%: tau = {entry['tau']:.6g}"
    if criterion_of(entry["criterion"]).by_chance:
        return line
    line += f", selects {100 * entry['share_selected']:.2f}% of {entry['tokens']:,} tokens"
    if abs(entry["share_selected"] - entry["share"]) > 0.1 * entry["share"]:
        line += f" ({100 * entry['tied']:.1f}% of them have one value, which is selected or not as a whole)"
    return line


def _key(setting: Setting) -> tuple:
    return tuple(getattr(setting, key) for key in KEYS)


def _read(folder: Path) -> dict[str, Any]:
    """Raises ValueError where the file is not what was written: another threshold would make another run."""
    path = folder / "calibration.json"
    content = {"passes": [], "thresholds": []} | read_record(path)
    known = content.pop("crc32", None)  # older files have none
    if known is not None and known != checksum(content):
        raise ValueError(
            f"{path}: damaged: not what was written, by its checksum; put the file back, or remove it together with "
            "the settings that it has thresholds for"
        )
    return content
