"""Scored responses as two near models give them, made with numpy alone: for the microscope's page and findings."""

import re

import numpy as np

from rlvr_jax.microscope.columns import Figure, ScoredResponse, TokenColumns

FIGURE = Figure("Δlog p", "Two histograms.", '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 40"><g/></svg>')
HOSTILE = "</script><img src=x onerror='window.hostile=1'>"
TEXT = """We want the number of positive integers n below 100 for which n^2 + n + 41 is prime.

Let f(n) = n^2 + n + 41. Since f(n) = n(n + 1) + 41, the value is always odd. Wait, I should check n = 40 first:
f(40) = 40 * 41 + 41 = 41^2, which is not prime. However, for n < 40 no factor below 41 divides f(n).

\tTherefore the count is at least 39. Let me verify the remaining cases one by one, because a formula is not a proof.
So the answer is \\boxed{86}."""

IDS: dict[str, int] = {}  # of every piece of text seen


def scored(
    problem: int, sample: int, source: str, text: str, *, seed: int = 0, correct: bool | None = True, top: int = 5
) -> ScoredResponse:
    """A response with numbers as two near models give them: most tokens are sure, some are moved."""
    rng = np.random.default_rng((seed, problem, sample, len(source)))
    # The hostile text is one token, as some tokenizer may have it.
    words = r"[^\S\n]?[A-Za-z]{1,7}|\n+|\d|[^\S\n]|[^\w\s]+|\w"
    pieces = re.findall(f"{re.escape(HOSTILE)}|{words}", text)
    assert "".join(pieces) == text
    return made_of(problem, sample, source, pieces, rng, correct=correct, top=top)


def made_of(
    problem: int,
    sample: int,
    source: str,
    pieces: list[str],
    rng: np.random.Generator,
    *,
    correct: bool | None = True,
    top: int = 5,
) -> ScoredResponse:
    T = len(pieces)
    token_T = np.array([IDS.setdefault(piece, 10 + len(IDS)) for piece in pieces], np.int32)
    unsure_T = rng.random(T) ** 6
    writer_T = -rng.exponential(unsure_T * 1.6 + 1e-4).astype(np.float32)
    moved_T = (rng.normal(0.12 if source == "rl" else -0.12, 1.1, T) * unsure_T).astype(np.float32)
    other_T = np.minimum(writer_T - moved_T, -1e-6) if source == "rl" else np.minimum(writer_T + moved_T, -1e-6)
    base_T, rl_T = (other_T, writer_T) if source == "rl" else (writer_T, other_T)
    rest_TK = -np.sort(rng.exponential(2.5, (T, top)), axis=1) - 0.7
    ids_TK = rng.choice(token_T, (T, top))

    def tops(logp_T):
        ids, logp = ids_TK.copy(), rest_TK + np.log1p(-np.exp(np.minimum(logp_T, -1e-3)))[:, None]
        ids[:, 0], logp[:, 0] = token_T, logp_T
        order = np.argsort(-logp, axis=1)
        return np.take_along_axis(ids, order, 1).astype(np.int32), np.take_along_axis(logp, order, 1)

    (base_ids, base_logp), (rl_ids, rl_logp) = tops(base_T), tops(rl_T)
    kl_T, back_T = (np.abs(moved_T) * rng.random(T) * 0.6 for _ in range(2))
    improbable_T = -np.expm1(base_T if source == "base" else rl_T)
    columns = TokenColumns(
        token=token_T,
        logp_base=base_T.astype(np.float32),
        logp_rl=rl_T.astype(np.float32),
        entropy_base=(unsure_T * 2.6 * rng.random(T)).astype(np.float32),
        entropy_rl=(unsure_T * 2.1 * rng.random(T)).astype(np.float32),
        kl=kl_T.astype(np.float32),
        kl_reverse=back_T.astype(np.float32),
        js=((kl_T + back_T) / 2).astype(np.float32),
        js_true=((kl_T + back_T) / 8).astype(np.float32),
        rank_base=1 + np.argmax(base_ids == token_T[:, None], axis=1).astype(np.int32),
        rank_rl=1 + np.argmax(rl_ids == token_T[:, None], axis=1).astype(np.int32),
        gradient_share=(improbable_T / max(improbable_T.sum(), 1e-9)).astype(np.float32),
        top_base_ids=base_ids,
        top_base_logp=base_logp.astype(np.float32),
        top_rl_ids=rl_ids,
        top_rl_logp=rl_logp.astype(np.float32),
    )
    prompt = f"Problem {problem}: how many positive integers n below 100 make n^2 + n + 41 prime? <b>Why?</b>"
    return ScoredResponse(problem, sample, source, prompt, "".join(pieces), "86", correct, pieces, columns)


def vocabulary() -> dict[int, str]:
    return {token: piece for piece, token in IDS.items()}


def small_page() -> list[ScoredResponse]:
    """Two problems with two responses of either model, one full of what must not be markup, and an empty one."""
    verdicts = {"base": (False, True), "rl": (True, None)}
    out = [
        scored(problem, sample, source, TEXT * (4 if sample else 1), correct=verdicts[source][sample])
        for problem in range(2)
        for source in ("base", "rl")
        for sample in range(2)
    ]
    strange = f"Look: {HOSTILE} & <b>bold</b>\n\n العربية نص and 中文字符 \u202eevil\u202c 👩‍👩‍👧 \x00 {'x' * 300}"
    for values, logp in ((out[0].columns.logp_base, -0.5), (out[0].columns.logp_rl, -0.75)):
        values[5] = logp  # dlogp is just the threshold of a test
    logp_base = out[1].columns.logp_base.copy()
    logp_base[4:7] = [-np.inf, -1e-8, -87.5]
    out[1] = out[1]._replace(columns=out[1].columns._replace(logp_base=logp_base))
    return [*out, scored(2, 0, "rl", strange), scored(2, 1, "base", "", correct=None)]
