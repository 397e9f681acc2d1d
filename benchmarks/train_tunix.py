"""tunix as a peer of `benchmarks.train`: its DAPO learner's loss in its own jitted trainer step; needs google-tunix.

The model, the loss, the optimizer's wrapper and the step are tunix's. Rollout, rewards and progress bars are left out:
a step gets the same sequences, weighted advantages and old log-probabilities as the other sides, in one batch.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3  # pyright: ignore[reportMissingImports]  (not part of `make lint`)
from tunix.models.qwen3 import params as qwen3_params  # pyright: ignore[reportMissingImports]
from tunix.rl import common, function_registry, trainer  # pyright: ignore[reportMissingImports]
from tunix.rl.grpo.dapo_learner import DAPOConfig  # pyright: ignore[reportMissingImports]
from tunix.sft.peft_trainer import TrainingConfig  # pyright: ignore[reportMissingImports]

from benchmarks import train_cases as cases
from benchmarks.memory_peak import peak_above, reset_peak
from benchmarks.worker import serve

_PAD, _EOS = 0, 1  # no token of the sequences is 0 before its end


def model_config(folder: str) -> Any:
    """tunix's configuration of the checkpoint in `folder`."""
    said = json.loads((Path(folder) / "config.json").read_text())
    if said["model_type"] != "qwen3":
        raise ValueError(f"{folder}: model_type is {said['model_type']}, expected qwen3")
    rope = said.get("rope_parameters") or {}
    return qwen3.ModelConfig(
        num_layers=said["num_hidden_layers"],
        vocab_size=said["vocab_size"],
        embed_dim=said["hidden_size"],
        hidden_dim=said["intermediate_size"],
        num_heads=said["num_attention_heads"],
        head_dim=said["head_dim"],
        num_kv_heads=said["num_key_value_heads"],
        rope_theta=int(said.get("rope_theta") or rope["rope_theta"]),
        norm_eps=said["rms_norm_eps"],
        use_tied_embedding=said["tie_word_embeddings"],
    )


def start(hello: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    model = qwen3_params.create_model_from_safe_tensors(
        hello["folder"], model_config(hello["folder"]), mesh, jnp.float32
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(cases.CLIP_NORM),
        optax.adamw(cases.LR, b1=cases.B1, b2=cases.B2, eps=cases.EPS, weight_decay=cases.WEIGHT_DECAY),
    )
    algorithm = DAPOConfig(epsilon=cases.CLIP_LOW, epsilon_high=cases.CLIP_HIGH)
    algorithm.temperature = 1.0
    loss_of = function_registry.get_policy_loss_fn(algorithm.policy_loss_fn)
    learner = trainer.Trainer(model, optimizer, TrainingConfig(eval_every_n_steps=10**9), dict)
    learner.with_loss_fn(
        lambda model, train_example, algo_config: loss_of(
            model, train_example, algo_config=algorithm, pad_id=_PAD, eos_id=_EOS
        ),
        has_aux=True,
    ).with_gen_model_input_fn(lambda example: {"train_example": example, "algo_config": algorithm})
    with mesh:
        step, _ = learner.jit_train_and_eval_step()
    prepared: dict[str, Any] = {}
    baseline = reset_peak()

    def prepare(kind: str) -> Any:
        """The sequences as tunix's learner would hand them on, padded to the longest."""
        made = cases.sequences(kind)
        longest = int(made.responses.max())
        ends = np.arange(longest) < made.responses[:, None]
        example = common.TrainExample(
            prompt_ids=jnp.asarray(made.tokens[:, : cases.PROMPT]),
            prompt_mask=jnp.ones((cases.ROWS, cases.PROMPT), bool),
            completion_ids=jnp.asarray(made.tokens[:, cases.PROMPT : cases.PROMPT + longest]),
            completion_mask=jnp.asarray(ends),
            advantages=jnp.zeros(ends.shape),
            ref_per_token_logps=None,
            old_per_token_logps=None,
        )
        old = common.compute_per_token_logps(
            *nnx.split(model), example.prompt_ids, example.completion_ids, pad_id=_PAD, eos_id=_EOS
        )
        weighted = made.advantages[:, None] * (1 + cases.ALPHA * (1 - jnp.exp(old)))
        return dataclasses.replace(example, old_per_token_logps=old, advantages=weighted)

    def update(kind: str) -> dict[str, Any]:
        nonlocal baseline
        with mesh:
            if kind not in prepared:
                prepared[kind] = prepare(kind)
                baseline = reset_peak()
            example = prepared[kind]
            started = time.perf_counter()
            loss, _, norm = step(example)
            loss, norm = float(loss), float(norm)
            jax.block_until_ready(nnx.state(model))
        computed = cases.ROWS * (cases.PROMPT + example.completion_ids.shape[1])
        return {
            "seconds": time.perf_counter() - started,
            "loss": loss,
            "grad_norm": norm,
            "peak": peak_above(baseline),
            "computed_tokens": computed,
            "padding_share": 1 - cases.sequences(kind).tokens_in_all / computed,
        }

    return lambda message: update(message["kind"])


if __name__ == "__main__":
    serve(start)
