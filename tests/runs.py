"""Training runs of a tiny model, as the tests start them and read what they leave."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from rlvr_jax.runs.checkpoint import Checkpoints
from tests.tiny import tiny_checkpoint, write_tiny_problems
from train.check.prepare import prepare
from train.run.loop import run

ROOT = Path(__file__).parent.parent


def write_inputs(place, **model):
    """Writes what `arguments` names: a model, 40 problems to train on and 8 to evaluate."""
    tiny_checkpoint(place / "model", **model)
    write_tiny_problems(place / "train.jsonl", 40)
    write_tiny_problems(place / "val.jsonl", 8)


def arguments(place, run_dir, **changes):
    """The flags of a run; in a name of `changes`, two underscores stand for a dot."""
    values = {
        "run_dir": run_dir,
        "steps": 4,
        "epochs": 20,
        "model.path": place / "model",
        "data.train": place / "train.jsonl",
        "data.val": place / "val.jsonl",
        "rollout.n": 4,
        "rollout.generation_batch": 8,
        "rollout.max_response": 16,
        "rollout.chunk": 8,
        "reward.rule": "tests.tiny_rules:contains",
        "reward.workers": 1,
        "reward.overlong_buffer": 8,
        "algorithm.reweight.kind": "low_prob",
        "algorithm.train_batch": 4,
        "algorithm.mini_batch": 2,
        "optim.lr": 3e-3,
        "optim.warmup": 2,
        "eval.every": 2,
        "eval.n": 4,
        "checkpoint.every": 1,
    } | {name.replace("__", "."): value for name, value in changes.items()}
    flags = []
    for name, value in values.items():
        group, dot, last = name.replace("_", "-").rpartition(".")
        said = [] if isinstance(value, bool) else [str(value)]
        flags += [f"--{group}{dot}{'no-' if value is False else ''}{last}", *said]
    return flags


def rows_of(path):
    """The values of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(place, run_dir, **changes):
    """Runs the training program in this process; its records."""
    run(prepare(arguments(place, run_dir, **changes)))
    return rows_of(run_dir / "metrics.jsonl")


def without_times(records):
    """Records without what no two runs share: seconds, speed, memory."""
    return [{k: v for k, v in r.items() if not re.match("seconds|rollout_tokens_per_s|.*_memory_", k)} for r in records]


def final_state(run_dir, step):
    """The bytes of each array and the host values of the newest checkpoint, which is of this step."""
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        assert checkpoints.latest == step
        host = checkpoints.host(step)
    leaves = {}
    tree = ocp.StandardCheckpointer().restore(run_dir / "checkpoints" / str(step) / "state")
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        leaves[jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return leaves, host
