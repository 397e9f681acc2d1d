"""What the kept programs of a run save when it is started again: `python -m benchmarks.compile_cache`.

The tests' tiny model is trained for one step; copies of that run are then started again for a second one, with the
folder of compiled programs and without it.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.tiny import tiny_checkpoint, write_tiny_problems

FLAGS = (
    *("--epochs", "20", "--rollout.n", "4", "--rollout.generation-batch", "8", "--rollout.max-response", "16"),
    *("--rollout.chunk", "8", "--reward.rule", "tests.tiny_rules:contains", "--reward.overlong-buffer", "8"),
    *("--algorithm.train-batch", "4", "--algorithm.mini-batch", "2", "--checkpoint.every", "1"),
)


def start(place: Path, run: str, steps: int, *flags: str) -> tuple[float, float]:
    """Seconds of the process, and of its last trainer step."""
    model = ("--model.path", str(place / "model"), "--data.train", str(place / "train.jsonl"))
    command = [sys.executable, "-m", "train", *FLAGS, *model, "--run-dir", str(place / run), "--steps", str(steps)]
    begin = time.perf_counter()
    subprocess.run([*command, *flags], check=True, capture_output=True)
    seconds = time.perf_counter() - begin
    last = json.loads((place / run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["trainer_steps"] == steps
    return seconds, last["seconds"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        tiny_checkpoint(place / "model")
        write_tiny_problems(place / "train.jsonl", 40)
        rows = [("first start", *start(place, "first", 1))]
        for name, flags in (("again", ()), ("again, --compile-cache None", ("--compile-cache", "None"))):
            shutil.copytree(place / "first", place / name)
            rows.append((name, *start(place, name, 2, *flags)))
        kept = sum(path.stat().st_size for path in (place / "first" / "compile_cache").iterdir())
    for name, seconds, step in rows:
        print(f"{name:30}{seconds:6.1f} s in all, {step:5.1f} s the trainer step")
    print(f"kept: {kept / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
