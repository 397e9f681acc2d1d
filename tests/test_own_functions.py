"""Functions of the user's own where a name is taken: in the library, in a run, in commands. README's example."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlvr_jax as rj
from rlvr_jax.entries import source_sha256
from rlvr_jax.models.qwen import init_params
from rlvr_jax.runs.fingerprint import of_code
from tests import own_functions
from tests.test_train_wiring import MODEL, N, R, groups, one_device, trainer
from tests.tiny import tiny_checkpoint
from train import config as c
from train.check.prepare import value_faults
from train.run.same_run import require_same_run
from train.step.objective import own_functions as named_functions

OWN = "tests.own_functions"
ROOT = Path(__file__).parent.parent


def test_a_criterion():
    rng = np.random.default_rng(0)
    base, rl = jax.nn.log_softmax(rng.normal(size=(2, 6, 9)))
    token = rng.integers(0, 9, 6)
    surprise = -np.asarray(base)[np.arange(6), token]
    tau = float(np.median(surprise))
    for criterion in (own_functions.surprise, f"{OWN}:surprise", rj.Criterion(own_functions.surprise)):
        np.testing.assert_array_equal(rj.fires(criterion, base, rl, token, tau), surprise >= tau)
        assert rj.threshold_for_share(criterion, surprise, 0.5).share_selected == 0.5
    half = rj.criterion_value("delta_logp", base, rl, token) / 2
    np.testing.assert_array_equal(rj.fires(f"{OWN}:shrunk", base, rl, token, -0.1), half <= -0.1)
    with pytest.raises(ValueError, match="expected \\(6,\\)"):
        rj.fires(lambda base, rl, token: base, base, rl, token, 0.0)


def test_a_criterion_decodes():
    config = dataclasses.replace(MODEL, dtype="float32")
    pair = [init_params(config, jax.random.key(i)) for i in range(2)]
    options = {"tau": 2.0, "gamma": 0.5, "max_new_tokens": 6, "n": 4, "block": 1}
    models = (config, pair[0], config, pair[1], [[1, 2, 3]])
    own, mine = (
        rj.generate_selective(*models, criterion=criterion, **options)
        for criterion in (f"{OWN}:shrunk", rj.Criterion(of_delta=lambda x: x / 2, below=True))
    )
    np.testing.assert_array_equal(own.tokens, mine.tokens)
    np.testing.assert_array_equal(own.fired, (own.delta_logp / 2 <= 2.0) & (np.arange(6) < own.lengths[:, None]))


def algorithm(**changes):
    return c.AlgorithmConfig(**{"train_batch": 2, "mini_batch": 2, "clip_dual": None} | changes)


EVERYTHING = algorithm(
    loss=f"{OWN}:reinforce",
    aggregation=f"{OWN}:half",
    reweight=c.ReweightConfig(f"{OWN}:by_dlogp", 0.5),
    loss_mask=c.MaskConfig(f"{OWN}:every_other"),
)


def test_they_make_a_trainer_step():
    """REINFORCE on every other token, at half the mean: from both models' log-probs, at learning rate 0."""
    config = c.Config(
        rollout=c.RolloutConfig(n=N, max_response=R),
        reward=c.RewardConfig(overlong_buffer=0),
        algorithm=EVERYTHING,
        optim=c.OptimConfig(warmup=10),
    )
    assert EVERYTHING.needs_reference
    reference = init_params(MODEL, jax.random.key(1), jnp.float32)
    with jax.set_mesh(one_device()):
        outcome = trainer(config, reference).train(groups(2), 0, lambda phase: None)
    arrays = outcome.arrays
    counted = (arrays["response_NR"] > 0) & (np.arange(R) % 2 == 0)
    loss = -(arrays["weighed_NR"] * arrays["old_logp_NR"])[counted].sum() / counted.sum() / 2
    assert outcome.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    gap = (arrays["rollout_logp_NR"] - arrays["old_logp_NR"])[counted].mean()
    assert outcome.metrics["gap"] == pytest.approx(gap, rel=1e-5)
    assert np.ptp(arrays["weight_NR"][arrays["response_NR"] > 0]) > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": f"{OWN}:nothing"}, f"algorithm.loss='{OWN}:nothing': cannot be imported"),
        (
            {"loss": f"{OWN}:wrong_arguments"},
            f"algorithm.loss={OWN}:wrong_arguments: failed on a tiny batch: TypeError",
        ),
        ({"loss": f"{OWN}:wrong_shape"}, "ValueError: loss='tests.own_functions:wrong_shape' gave an array ()"),
        ({"loss": f"{OWN}:wrong_metric"}, "failed on a tiny batch: TypeError"),
        ({"reweight": c.ReweightConfig(f"{OWN}:every_other")}, None),
        ({"reweight": c.ReweightConfig(f"{OWN}:surprise")}, f"algorithm.reweight.kind={OWN}:surprise: failed"),
        ({"loss_mask": c.MaskConfig("no.such.module:f")}, "algorithm.loss_mask.kind='no.such.module:f': cannot be"),
        ({"reweight": c.ReweightConfig("inverse", 0.0)}, "algorithm.reweight.alpha=0.0: expected a number > 0"),
    ],
)
def test_what_is_wrong_is_said_before_a_file_is_opened(changes, message):
    config = c.Config(model=c.ModelConfig(path="m"), data=c.DataConfig(train="d"), algorithm=algorithm(**changes))
    found = [fault.sentence for fault in value_faults(config)]
    assert not found if message is None else any(message in sentence for sentence in found), found


def test_a_changed_file_is_another_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "changing_rule.py").write_text("def rule(response, answer):\n    return True\n")
    config = c.Config(algorithm=EVERYTHING, reward=c.RewardConfig("changing_rule:rule"))
    functions = dict(named_functions(config))
    assert functions == {
        "reward.rule": "changing_rule:rule",
        "algorithm.loss": f"{OWN}:reinforce",
        "algorithm.reweight.kind": f"{OWN}:by_dlogp",
        "algorithm.aggregation": f"{OWN}:half",
        "algorithm.loss_mask.kind": f"{OWN}:every_other",
    }
    before = {"inputs": of_code(functions.items())}
    (tmp_path / "changing_rule.py").write_text("def rule(response, answer):\n    return False\n")
    now = {"inputs": of_code(functions.items())}
    assert source_sha256(f"{OWN}:half") in now["inputs"].values()
    with pytest.raises(ValueError, match=r"^code of reward.rule=changing_rule:rule: .*--checkpoint.changed-code"):
        require_same_run(before, now, ("checkpoint",), defaults={})
    require_same_run(before, now | {"checkpoint": {"changed_code": True}}, ("checkpoint",), defaults={})


def test_a_module_without_a_file_has_no_hash():
    """Missing, inside of a missing package or of a module, built in."""
    for name in ("missing_module:f", "missing.package:f", "tests.own_functions.inside:f", "sys:exit"):
        assert source_sha256(name) == "", name


def test_they_are_checked_without_a_device():
    """Before the processes of a run find one another, which must come before any use of a device."""
    program = (
        "from tests.test_own_functions import EVERYTHING\n"
        "from train.step.objective import check_functions, loss_dtypes\n"
        "check_functions(EVERYTHING)\nprint(len(loss_dtypes(EVERYTHING)))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "tpu"}  # of which there is none here
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["8"], done.stderr[-2000:]


def test_the_example_of_the_readme(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    tiny_checkpoint(tmp_path / "runs" / "demo" / "base" / "hf", num_layers=1)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    assert np.isfinite(found["metrics"]["loss"])
    assert found["metrics"]["weight"] == found["out"].lengths.sum()
    logp, chosen = found["logp"], found["response"]
    weight = 1 + 0.2 * (1 - np.exp(logp))
    alone = rj.group_advantages(np.array([x.reward for x in found["graded"]]), np.repeat([0, 1], 8))
    np.testing.assert_allclose(
        np.asarray(found["tokens"].advantages_BT)[chosen], (np.asarray(alone)[:, None] * weight)[chosen], rtol=1e-5
    )
