"""`python -m train.sft`: how a base model is born."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.data.text import load_tokenizer
from rlvr_jax.models.hf import load_hf
from rlvr_jax.models.qwen import hidden_states, logits
from tests.tiny import compiled_once, tiny_config, tiny_tokenizer
from train.sft import initial_params, prepare, run
from train.step.sft_rows import Rows, encode
from train.step.sft_step import make_loss


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("sft")
    (path / "init").mkdir()
    (path / "init" / "config.json").write_text(json.dumps(tiny_config().to_hf()))
    tiny_tokenizer().save_pretrained(path / "init")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}+1"},
                {"role": "assistant", "content": str((i + 1) % 10) * (1 + i % 3)},
            ]
        }
        for i in range(10)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with compiled_once(path / "cache"):
        yield path


def arguments(place, run_dir, **changes):
    values = {
        "init-config": place / "init",
        "tokenizer": place / "init",
        "data": place / "rows.jsonl",
        "run-dir": place / run_dir,
        "batch": 16,
        "steps": 30,
        "optim.lr": 2e-2,
        "optim.schedule": "constant",
        "optim.warmup": 5,
    } | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def records(place, run_dir):
    return [json.loads(line) for line in (place / run_dir / "metrics.jsonl").read_text().splitlines()]


def test_loss_is_the_mean_over_assistant_tokens_alone(place):
    tokenizer = load_tokenizer(place / "init")
    conversations = encode(tokenizer, str(place / "rows.jsonl"), 64)
    job = prepare(arguments(place, "unused"))
    params = initial_params(job)

    def apply(params, tokens, positions, segments):
        return hidden_states(job.model_config, params, tokens, positions, segments), params["embed"].T

    rows = Rows(conversations, 10, most_rows=16, shards=1).of(np.arange(10))
    mask_RT = rows.spread(rows.response_NR.astype(np.int32))
    batch = {"tokens_BT": rows.tokens, "segment_BT": rows.segments, "loss_mask_BT": mask_RT}
    (total, weight), _ = make_loss(chunk=8)(apply, params, jax.tree.map(jnp.asarray, batch))
    expected, count = 0.0, 0
    longest = max(len(tokens) for tokens, _ in conversations)
    tokens_NT = np.stack([np.pad(tokens, (0, longest - len(tokens))) for tokens, _ in conversations])
    hidden, unembed = apply(params, jnp.asarray(tokens_NT), None, None)
    for (tokens, context), hidden_TD in zip(conversations, np.asarray(hidden, np.float64), strict=True):
        out_TV = hidden_TD @ np.asarray(unembed, np.float64)
        logp_TV = out_TV - np.log(np.exp(out_TV).sum(axis=-1, keepdims=True))
        for t in range(context, len(tokens)):
            expected -= logp_TV[t - 1, tokens[t]]
            count += 1
    answers = sum(len(str((i + 1) % 10) * (1 + i % 3)) + 1 for i in range(10))  # and the end-of-turn token
    assert (count, float(weight)) == (answers, answers)
    np.testing.assert_allclose(float(total), expected, rtol=1e-5)
    tokens, context = conversations[0]
    assert tokenizer.decode(tokens[context:]) == "1<|im_end|>"


def test_from_random_weights_to_a_model_that_answers_and_resume(place):
    run(prepare(arguments(place, "whole")))
    made = records(place, "whole")
    assert [r["trainer_steps"] for r in made] == list(range(1, 31))
    assert made[0]["loss"] > 2
    assert all(0 <= r["padding_share"] < 0.6 for r in made)
    assert made[-1]["loss"] < 0.1
    assert [round(r["lr"], 6) for r in made[:6]] == [0.004, 0.008, 0.012, 0.016, 0.02, 0.02]
    config, params = load_hf(place / "whole" / "hf", dtype=jnp.float32)
    tokenizer = load_tokenizer(place / "whole" / "hf")
    prompt = tokenizer.encode("<|im_start|>user\n4+1<|im_end|>\n<|im_start|>assistant\n")
    out = logits(config, params, hidden_states(config, params, jnp.array([prompt])))
    assert tokenizer.decode([int(out[0, -1].argmax())]) == "5"

    run(prepare(arguments(place, "parts", steps=12)))
    run(prepare(arguments(place, "parts", steps=30)))
    again = records(place, "parts")
    assert [(r["trainer_steps"], r["loss"], r["grad_norm"]) for r in again] == [
        (r["trainer_steps"], r["loss"], r["grad_norm"]) for r in made
    ]
    for a, b in zip(
        jax.tree.leaves(params), jax.tree.leaves(load_hf(place / "parts" / "hf", dtype=jnp.float32)[1]), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"init_config": ""}, "expected one of the two"),
        ({"model": "x"}, "expected one of the two"),
        ({"tokenizer": ""}, "tokenizer='': expected a folder"),
        ({"data": "nowhere.jsonl"}, r"nowhere\.jsonl: no such file"),
        ({"micro_batches": 3}, "micro_batches=3 does not divide batch=16"),
        ({"micro_batches": 4}, "= 4 rows do not divide over the 8 shards"),
        ({"max_tokens": 3}, "max_tokens=3"),
        ({"optim__lr": 0}, r"optim\.lr=0"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_bad_input_is_refused(place, changes, match):
    with pytest.raises((ValueError, OSError), match=match):
        prepare(arguments(place, "refused", **changes))
    assert not (place / "refused").exists()


def test_another_length_of_a_cosine_run_is_another_run(place):
    run(prepare(arguments(place, "cosine", steps=2, optim__schedule="cosine")))
    assert [r["lr"] for r in records(place, "cosine")] == pytest.approx([0.004, 0.008])
    with pytest.raises(ValueError, match="steps: the checkpoint was made with 2"):
        prepare(arguments(place, "cosine", steps=3, optim__schedule="cosine"))
