"""Evaluation during training: Avg@n and Pass@k over the validation problems."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rlvr_jax.data.problems import Problem, group_by_id
from rlvr_jax.data.prompts import PromptSet
from rlvr_jax.evaluation import avg_at_k, avg_per_problem, mean_interval, pass_at_k
from rlvr_jax.rewards.pool import GraderPool
from train.config import Config
from train.records.tokens import drawn
from train.step.rollout import Decoder, eval_seed, rows_done


def distinct(problems: list[Problem]) -> list[Problem]:
    """The first row of each problem: published files repeat rows, here `eval.n` says how often each is tried."""
    return [problems[rows[0]] for rows in group_by_id(problems)]


def evaluate(
    config: Config,
    decoder: Decoder,
    params: Any,
    prompts: PromptSet,
    pool: GraderPool,
    on_phase: Callable[[str], None],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`eval.n` responses to every validation problem, with the same random numbers at every evaluation.

    Returns:
      The metrics, and one readable row a response. Avg@n has its 95% interval over problems, NaN with one problem.
    """
    settings, reward = config.eval, config.reward
    on_phase("eval")
    start = time.monotonic()
    generations = decoder(
        params,
        prompts.tokens,
        [problem.index for problem in prompts.problems],
        prompt_length=max(len(tokens) for tokens in prompts.tokens),
        at_once=settings.prompts_at_once,
        on_tokens=rows_done(on_phase, "eval", len(prompts) * settings.n),
        n=settings.n,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=eval_seed(settings.seed),
    )
    seconds = time.monotonic() - start
    samples = [
        (problem, prompt, generation.tokens[i, : generation.lengths[i]], bool(generation.finished[i]))
        for problem, prompt, generation in zip(prompts.problems, prompts.tokens, generations, strict=True)
        for i in range(settings.n)
    ]
    texts = [decoder.text(tokens) for _, _, tokens, _ in samples]
    graded = pool.grade(reward.rule, texts, [problem.answer for problem, *_ in samples])
    correct = np.array([verdict.correct for verdict in graded]).reshape(len(prompts), settings.n)
    _, low, high = mean_interval(avg_per_problem(correct, settings.n))
    lengths = [len(tokens) for _, _, tokens, _ in samples]
    metrics = {
        f"avg@{settings.n}": avg_at_k(correct, settings.n),
        f"avg@{settings.n}_low": low,
        f"avg@{settings.n}_high": high,
        **{f"pass@{k}": pass_at_k(correct, k) for k in settings.pass_k if k <= settings.n},
        "problems": len(prompts),
        "response_length": float(np.mean(lengths)),
        "response_cut_share": float(np.mean([not finished for *_, finished in samples])),
        "grading_errors": sum(verdict.error is not None for verdict in graded),
        "rollout_tokens_per_s": sum(lengths) / max(seconds, 1e-9),
        "seconds": time.monotonic() - start,
    }
    rows = [
        {
            "problem": problem.id,
            **drawn(decoder.tokenizer, prompt, tokens),
            "response": text,
            "answer": problem.answer,
            "prediction": verdict.prediction,
            "correct": verdict.correct,
            "error": verdict.error,
            "score": verdict.reward,
            "length": len(tokens),
            "finished": finished,
        }
        for (problem, prompt, tokens, finished), text, verdict in zip(samples, texts, graded, strict=True)
    ]
    return metrics, rows
