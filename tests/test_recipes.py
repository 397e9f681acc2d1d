"""Every training recipe, read as the program reads it: the values that were published, and what it changes."""

import dataclasses
from pathlib import Path

import pytest

from train.check.prepare import configuration, value_faults
from train.config import Config, MaskConfig

ROOT = Path(__file__).parent.parent
SEVEN, EIGHT = "qwen2_5_math_7b", "qwen3_8b_base"


def recipe(name: str) -> Config:
    return configuration(["--config", str(ROOT / "configs" / f"{name}.py")])


def flat(config: Config) -> dict:
    def walk(tree, prefix):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(dataclasses.asdict(config), ""))


NO_WEIGHTS = {"algorithm.reweight.kind": "none"}
GRPO = NO_WEIGHTS | {
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.2,
    "algorithm.clip_dual": None,
    "algorithm.dynamic_sampling": False,
    "rollout.generation_batch": 512,
    "reward.overlong_buffer": 0,
}
# name -> (the recipe it changes, all its changes but run_dir)
CHANGES = {
    f"{SEVEN}_dapo": (SEVEN, NO_WEIGHTS),
    f"{EIGHT}_dapo": (EIGHT, NO_WEIGHTS),
    **{
        f"{SEVEN}_{kind}": (SEVEN, {"algorithm.reweight.kind": kind})
        for kind in ("high_prob", "ppl", "ppl_norm", "ppl_norm_clamp", "uniform", "shuffled")
    },
    f"{SEVEN}_top_p": (SEVEN, NO_WEIGHTS | {"rollout.top_p": 0.95}),
    f"{SEVEN}_high_entropy": (SEVEN, NO_WEIGHTS | {"algorithm.loss_mask.kind": "highest_entropy"}),
    f"{SEVEN}_grpo": (SEVEN, GRPO | {"algorithm.kl_coef": 0.04, "algorithm.aggregation": "seq-mean-token-mean"}),
    f"{SEVEN}_dr_grpo": (
        SEVEN,
        GRPO | {"algorithm.normalize_by_std": False, "algorithm.aggregation": "seq-mean-token-sum-norm"},
    ),
    f"{SEVEN}_gspo": (
        SEVEN,
        NO_WEIGHTS
        | {
            "algorithm.loss": "gspo",
            "algorithm.clip_low": 3e-4,
            "algorithm.clip_high": 4e-4,
            "algorithm.aggregation": "seq-mean-token-mean",
            "algorithm.mini_batch": 128,  # four a trainer step
            "algorithm.micro_batches": 64,
        },
    ),
    f"{SEVEN}_cispo": (
        SEVEN,
        NO_WEIGHTS | {"algorithm.loss": "cispo", "algorithm.clip_low": 1.0, "algorithm.clip_high": 4.0},
    ),
}
# Everything else is as in the published script of the model; these are what both scripts share.
PUBLISHED = {
    "epochs": 1,
    "data.max_prompt": 2048,
    "data.too_long": "truncate_left",
    "rollout.n": 16,
    "rollout.generation_batch": 1536,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "reward.rule": "dapo_answer",
    "reward.overlong_buffer": 4096,
    "reward.overlong_factor": 1.0,
    "algorithm.loss": "dapo",
    "algorithm.reweight.kind": "low_prob",
    "algorithm.reweight.where": "all",
    "algorithm.loss_mask.kind": "all",
    "algorithm.normalize_by_std": True,
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.28,
    "algorithm.clip_dual": 10.0,
    "algorithm.kl_coef": 0.0,
    "algorithm.importance": "none",
    "algorithm.aggregation": "token-mean",
    "algorithm.dynamic_sampling": True,
    "algorithm.max_generation_batches": 10,
    "algorithm.train_batch": 512,
    "algorithm.mini_batch": 32,
    "optim.lr": 1e-6,
    "optim.warmup": 10,
    "optim.weight_decay": 0.1,
    "optim.clip_norm": 1.0,
    "eval.every": 5,
    "eval.temperature": 1.0,
    "eval.top_p": 0.7,
    "checkpoint.every": 10,
}
OWN = {
    SEVEN: {"algorithm.reweight.alpha": 0.2, "rollout.max_response": 8192, "model.max_position_embeddings": 32768},
    EIGHT: {"algorithm.reweight.alpha": 0.1, "rollout.max_response": 20480, "model.max_position_embeddings": None},
}


@pytest.mark.parametrize("name", OWN)
def test_the_two_runs_of_the_paper_have_its_values(name):
    values = flat(recipe(name))
    wanted = PUBLISHED | OWN[name]
    assert {key: values[key] for key in wanted} == wanted


def test_every_recipe_of_the_paper_is_listed_here():
    there = {path.stem for path in (ROOT / "configs").glob("qwen*.py")}
    assert there == {SEVEN, EIGHT, *CHANGES}


@pytest.mark.parametrize("name", [SEVEN, EIGHT, *CHANGES])
def test_a_recipe_is_valid_opens_with_its_command_and_changes_what_it_says(name):
    config, text = recipe(name), (ROOT / "configs" / f"{name}.py").read_text()
    assert list(value_faults(config)) == []
    assert f"python -m train --config configs/{name}.py" in text[:400]
    assert config.run_dir == f"runs/{name}"
    shards = config.mesh.data * config.mesh.fsdp
    assert config.algorithm.mini_batch * config.rollout.n // config.algorithm.micro_batches % shards == 0
    base, changes = CHANGES.get(name, (name, {}))
    before, after = flat(recipe(base)), flat(config)
    before.pop("run_dir"), after.pop("run_dir")
    assert {key: value for key, value in after.items() if value != before[key]} == {
        key: value for key, value in changes.items() if value != before[key]
    }


def test_the_entropy_mask_keeps_the_highest_fifth():
    assert recipe(f"{SEVEN}_high_entropy").algorithm.loss_mask == MaskConfig("highest_entropy", 0.8)


def test_what_recipes_do_not_say_is_refused_where_it_is_wrong():
    bad = dataclasses.replace(
        recipe(SEVEN),
        algorithm=dataclasses.replace(recipe(SEVEN).algorithm, clip_low=1.0, kl_coef=-0.1, importance_cap=0.0),
        epochs=0,
    )
    assert [fault.key for fault in value_faults(bad)] == [
        "epochs",
        "algorithm.kl_coef",
        "algorithm.importance_cap",
        "algorithm.clip_low",
    ]
