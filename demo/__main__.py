"""`python -m demo`: base model, DAPO, decoding with both models, table and figure, on a CPU in minutes.

Every step is one of the programs a full-size run uses, on the same file formats; the command is printed before it runs
and can be repeated by hand. Run again, the demo continues where it was stopped.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from decode.results.summary import write_summaries
from decode.results.tables import print_settings
from demo import figure, study, task
from rlvr_jax.runs.bounds import Count, PathText, Range, Seed, require
from rlvr_jax.runs.checkpoint import check_place
from rlvr_jax.runs.files import atomic_path, write_json
from rlvr_jax.runs.lock import lock
from rlvr_jax.runs.program import RunError, config_dict, console, parse_flags, run_program

STAGES = 6


@dataclasses.dataclass(frozen=True)
class Demo:
    out: PathText = "runs/demo"
    """Folder of everything the demo makes."""
    fillers: Annotated[int, Range(0, 26)] = 6
    """Meaningless letters that open a step; 0: none (they handicap criteria by entropy)."""
    seed: Seed = 0
    """Of the supervised training, of DAPO and of decoding."""
    problems: Annotated[int, Range(1, 100_000)] = 256
    """Held-out problems that are decoded."""
    n: Count = 4
    """Samples a problem."""


def prepare(argv: Sequence[str]) -> Demo:
    demo = parse_flags(Demo, argv, prog="python -m demo", description=__doc__)
    require(demo)
    check_place(demo.out)
    settings = Path(demo.out) / "demo.json"
    if settings.exists() and json.loads(settings.read_text()) != config_dict(demo):
        raise ValueError(f"{demo.out} holds a demo with other settings ({settings}): give another --out or remove it")
    return demo


def run(demo: Demo) -> None:
    with lock(demo.out):
        _run(demo)


def _run(demo: Demo) -> None:
    started = time.monotonic()
    out = Path(demo.out)
    write_json(out / "demo.json", config_dict(demo))
    base, rl, problems = out / "base" / "hf", out / "dapo" / "hf", out / "task" / "test.parquet"

    stage(1, "the task: problems, demonstrations, tokenizer")
    if not problems.exists():
        task.write_task(
            out / "task", task.Task(fillers=demo.fillers), clean_rows=30_000, mixed_rows=16_000, train=4_096,
            test=demo.problems,
        )  # fmt: skip
    stage(2, "the base model: supervised, first on careful demonstrations, then on the mixed crowd")
    supervised(
        "clean", out / "clean", demo, "--init-config", out / "task" / "init", "--tokenizer", out / "task" / "init"
    )
    supervised("mixed", out / "base", demo, "--model", out / "clean" / "hf")
    stage(3, "reinforcement learning: DAPO with low-probability re-weighting, from the base model")
    command("train", "--config", "configs/demo_dapo.py", "--run-dir", out / "dapo", "--seed", demo.seed,
            "--model.path", base, "--data.train", out / "task" / "train.parquet", "--data.val", problems)  # fmt: skip
    stage(4, "decoding with each model alone")
    decode(demo, "alone", study.ALONE, base, rl, problems, save_tokens=True)
    stage(5, "decoding with both: selective replacement, extrapolation, controls")
    decode(demo, "pair", study.settings(), base, rl, problems, save_tokens=False)
    stage(6, "table and figure")
    summaries = [s for name in ("alone", "pair") for s in json.loads((out / name / "summary.json").read_text())]
    figure.draw(out / "demo.png", metrics=out / "dapo" / "metrics.jsonl", alone=out / "alone", summaries=summaries)
    write_summaries(out, summaries)
    report(summaries, out / "summary.txt")
    console.print(f"\nfigure: {out / 'demo.png'}   models: {base}, {rl}   {time.monotonic() - started:.0f} s in all")


def supervised(kind: str, folder: Path, demo: Demo, *start: object) -> None:
    data = Path(demo.out) / "task" / f"{kind}.jsonl"
    recipe = f"configs/demo_sft_{kind}.py"
    command("train.sft", "--config", recipe, "--run-dir", folder, "--data", data, "--seed", demo.seed, *start)


def decode(
    demo: Demo,
    name: str,
    settings: tuple[study.Setting, ...],
    base: Path,
    rl: Path,
    problems: Path,
    *,
    save_tokens: bool,
) -> None:
    """Writes a recipe with these settings and runs the batch decoder on it."""
    recipe = Path(demo.out) / f"decode_{name}.py"
    lines = ",\n        ".join(repr(setting) for setting in settings)
    with atomic_path(recipe) as path:
        path.write_text(
            f'"""python -m decode --config {recipe}"""\n\n'
            "from decode.config import Calibration, DecodeConfig, Setting\n\n"
            "config = DecodeConfig(\n"
            f"    base={str(base)!r},\n    rl={str(rl)!r},\n    problems={str(problems)!r},\n"
            f"    out={str(Path(demo.out) / name)!r},\n    seeds=({demo.seed},),\n    n={demo.n},\n"
            f"    max_new_tokens=48,\n    slots=256,\n    save_tokens={save_tokens},\n    print_table=False,\n"
            f"    calibration=Calibration(responses={demo.problems * demo.n}),\n"
            f"    settings=(\n        {lines},\n    ),\n)\n"
        )
    command("decode", "--config", recipe)


def command(module: str, *arguments: object) -> None:
    words = ["-m", module, *map(str, arguments)]
    console.print("$ python " + " ".join(words), style="dim", markup=False, highlight=False, soft_wrap=True)
    code = subprocess.run([sys.executable, *words], check=False).returncode
    if code:
        raise RunError(f"python -m {module} ended with exit code {code}")


def stage(number: int, text: str) -> None:
    console.print(f"\n[bold][{number}/{STAGES}][/bold] {text}", highlight=False)


def report(summaries: list[dict], file: Path) -> None:
    """The rows that are looked for first, and in words what they show and what they do not; `file` has all rows."""
    by_name = {summary["setting"]: summary for summary in summaries}
    print_settings(console, summaries, file)
    for line in findings(by_name):
        console.print(f"* {line}", highlight=False, soft_wrap=True)


def findings(by_name: dict[str, dict]) -> list[str]:
    """Sentences made from the numbers of this run, whichever way they fall."""

    def accuracy(name: str) -> float:
        return 100 * by_name[name]["avg_at_k"]

    lines = [
        f"base alone {accuracy('base'):.1f}%, greedy {accuracy('base_greedy'):.1f}%; rl alone {accuracy('rl'):.1f}%."
    ]
    for criterion in study.SHARES:
        runs = [s for name, s in by_name.items() if name.startswith(f"replace_{criterion}_")]
        reached = [s for s in runs if s["avg_at_k"] >= by_name["rl"]["avg_at_k"]]
        if reached:
            least = min(reached, key=lambda s: s["share_selected"])
            lines.append(
                f"{criterion}: reaches rl's accuracy with {100 * least['share_selected']:.1f}% of tokens selected."
            )
        else:
            best = max(runs, key=lambda s: s["avg_at_k"])
            lines.append(
                f"{criterion}: does not reach rl's accuracy at the shares tried; at best "
                f"{100 * best['avg_at_k']:.1f}% with {100 * best['share_selected']:.1f}% selected."
            )
    none, best = accuracy("extra_rl_g0"), max(study.GAMMAS, key=lambda g: accuracy(f"extra_rl_g{g:g}"))
    lines.append(
        f"extrapolation on rl: gamma {best:g} gives {accuracy(f'extra_rl_g{best:g}'):.1f}%, against {none:.1f}% at "
        f"gamma 0 (the redraw alone), {accuracy('rl_T0.5'):.1f}% for rl at T = 0.5 and "
        f"{accuracy('rl_greedy'):.1f}% greedy."
    )
    lines.append(
        "This shows that every part works together on a task whose errors are choices. It does not show that the "
        "paper's findings hold: this is arithmetic with 0.2 million parameters, made so that one token a step decides."
    )
    return lines


if __name__ == "__main__":
    raise SystemExit(run_program(prepare, run))
