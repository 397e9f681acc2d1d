"""torch + transformers as a peer of `benchmarks.train`: a DAPO update as one would write it; needs no jax."""

import time
from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]  (its extra is not part of `make lint`)
from transformers import AutoModelForCausalLM

from benchmarks import train_cases as cases
from benchmarks.memory_peak import peak_above, reset_peak
from benchmarks.worker import serve


def start(hello: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    torch.set_num_threads(hello["threads"])
    model = AutoModelForCausalLM.from_pretrained(hello["folder"], dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cases.LR, betas=(cases.B1, cases.B2), eps=cases.EPS, weight_decay=cases.WEIGHT_DECAY
    )
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=hello["dtype"] == "bfloat16")
    prepared: dict[str, dict[str, torch.Tensor]] = {}
    baseline = reset_peak()

    def logprobs(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with autocast:
            logits = model(batch["tokens"], attention_mask=batch["mask"], use_cache=False).logits
        logp = torch.log_softmax(logits[:, :-1].float(), -1)
        return logp.gather(-1, batch["tokens"][:, 1:, None])[..., 0]

    def prepare(kind: str) -> dict[str, torch.Tensor]:
        made = cases.sequences(kind)
        longest = cases.PROMPT + int(made.responses.max())
        tokens = torch.from_numpy(made.tokens[:, :longest]).long()
        columns = torch.arange(longest)
        ends = cases.PROMPT + torch.from_numpy(made.responses)[:, None]
        batch = {"tokens": tokens, "mask": (columns < ends).long()}
        batch["response"] = ((columns >= cases.PROMPT) & (columns < ends))[:, 1:].float()
        with torch.no_grad():
            batch["old_logp"] = logprobs(batch)
        weight = 1 + cases.ALPHA * (1 - batch["old_logp"].exp())
        batch["advantage"] = torch.from_numpy(made.advantages)[:, None] * weight
        return batch

    def update(kind: str) -> dict[str, Any]:
        nonlocal baseline
        if kind not in prepared:
            prepared[kind] = prepare(kind)
            baseline = reset_peak()
        batch = prepared[kind]
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        ratio = (logprobs(batch) - batch["old_logp"]).clamp(-20, 20).exp()
        advantage = batch["advantage"]
        loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - cases.CLIP_LOW, 1 + cases.CLIP_HIGH))
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * cases.CLIP_DUAL), loss)
        loss = (loss * batch["response"]).sum() / batch["response"].sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cases.CLIP_NORM)
        optimizer.step()
        return {
            "seconds": time.perf_counter() - started,
            "loss": float(loss),
            "grad_norm": float(norm),
            "peak": peak_above(baseline),
            "computed_tokens": batch["tokens"].numel(),
            "padding_share": 1 - float(batch["mask"].float().mean()),
        }

    return lambda message: update(message["kind"])


if __name__ == "__main__":
    serve(start)
