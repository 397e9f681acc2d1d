"""One HTML file that shows scored responses token by token: self-contained, no network, opens from disk.

The numbers travel as gzipped byte planes (all first bytes of a column, then all second bytes, ...), one block a
response, so that a page opens with the response it shows and reads the others behind it. log pi of a response's tokens
is kept bit for bit: a share of tokens at a threshold of dlogp is the one that the files give. Of the other columns:

| column | kept | error at most |
|---|---|---|
| entropies, divergences, gradient share | 24 of 32 bits | 2^-16 of the value |
| log pi of the alternatives | float16; below -7 in steps of 1/16 | 2^-11 of the value; 3% of a probability under 0.1% |

Texts are only ever shown as text. What a token may hold (markup, scripts) cannot run: it is inside the gzipped blocks,
and the page's own content policy allows the one script whose hash it names and no address at all.
"""

import base64
import gzip
import hashlib
import html
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlvr_jax.criteria import CRITERIA
from rlvr_jax.microscope.columns import Figure, ScoredResponse
from rlvr_jax.runs.files import atomic_path, valid_text

# In this order.
_SCRIPTS = ("dom.js", "data.js", "colour.js", "layout.js", "pane.js", "inspector.js", "controls.js", "app.js")
_FLOATS = ("entropy_base", "entropy_rl", "kl", "kl_reverse", "js", "js_true", "gradient_share")
_COLOURED = ("delta_logp", "entropy_base", "entropy_rl", "kl", "kl_reverse", "js", "js_true")
_UNLIKELY = -7.0  # log-probabilities of alternatives below it are kept in coarser steps
_COARSE = 16  # of a nat


def write_page(
    path: str | os.PathLike[str],
    responses: Sequence[ScoredResponse],
    *,
    vocabulary: Mapping[int, str],
    figures: Sequence[Figure] = (),
    title: str = "The direction of an update, token by token",
    note: str = "",
    names: tuple[str, str] = ("base", "RL"),
) -> int:
    """Writes the page, atomically, and gives its size in bytes (about 60 a token with the five best of both models).

    Args:
      path: the HTML file.
      responses: what the page shows, at least one. Two of one problem can be put side by side.
      vocabulary: the text of every id in the tops; an id that is not in it is shown by its number.
      figures: shown under a tab of their own.
      title, note: the page's heading, and a sentence under it: which models, which responses, chosen how.
      names: what the page calls the two models.

    Raises:
      ValueError: no responses, two of one problem, sample and source, a column of another length than the response's
        pieces, or responses that differ in how many alternatives they hold.
    """
    _check(responses)
    words = _words(responses, vocabulary)
    # A table's indices in as few bytes as the largest needs; the frequent words have the small ones.
    wide = {"word": _bytes_for(len(words) - 1), "rank": _bytes_for(max(_largest_rank(r) for r in responses))}
    prompts = {prompt: place for place, prompt in enumerate(dict.fromkeys(r.prompt for r in responses))}
    manifest = {
        "title": title,
        "note": note,
        "names": list(names),
        "top": _tops(responses[0]),
        "layout": _layout(_tops(responses[0]), wide),
        "extents": _extents(responses),
        "words": {"ids": [token for token, _ in words], "texts": [text for _, text in words]},
        "prompts": list(prompts),
        "responses": [
            {
                "problem": int(r.problem),
                "sample": int(r.sample),
                "source": r.source,
                "prompt": prompts[r.prompt],
                "answer": r.answer,
                "correct": None if r.correct is None else bool(r.correct),
                "length": len(r.pieces),
            }
            for r in responses
        ],
        "figures": [figure._asdict() for figure in figures],
    }
    style, script = _asset("page.css"), _joined_scripts()
    policy = f"default-src 'none'; img-src blob: data:; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
    filled = {
        "title": html.escape(valid_text(title)),
        "policy": policy + "base-uri 'none'; form-action 'none'",
        "style": style,
        "script": script,
    }
    head, tail = (_fill(part, filled) for part in _asset("page.html").split("{{data}}"))
    index = {word: place for place, word in enumerate(words)}
    by_id = {token: index[token, _text(vocabulary, token)] for token in _top_ids(responses)}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(head.encode())
        # Plain ASCII: what is no valid text (half a surrogate pair) arrives as it was.
        file.write(_block("manifest", json.dumps(manifest, separators=(",", ":")).encode("ascii")))
        for place, response in enumerate(responses):
            file.write(_block(f"response-{place}", _planes(response, index, by_id, wide)))
        file.write(tail.encode())
        return file.tell()


def _check(responses: Sequence[ScoredResponse]) -> None:
    if not responses:
        raise ValueError("responses is empty: expected at least one response to show")
    seen: set[tuple[int, int, str]] = set()
    for r in responses:
        key = (int(r.problem), int(r.sample), r.source)
        name = f"the response of problem {key[0]}, sample {key[1]}, source {key[2]!r}"
        if key in seen:
            raise ValueError(f"{name} is there twice")
        seen.add(key)
        for column, values in r.columns._asdict().items():
            if len(values) != len(r.pieces):
                raise ValueError(f"{name}: column {column} has {len(values)} rows, pieces has {len(r.pieces)}")
        if len({_tops(r), r.columns.top_base_logp.shape[1], r.columns.top_rl_ids.shape[1], _tops(responses[0])}) > 1:
            raise ValueError(f"{name} does not hold as many alternatives everywhere as the first response")


def _tops(response: ScoredResponse) -> int:
    return int(response.columns.top_base_ids.shape[1])


def _text(vocabulary: Mapping[int, str], token: int) -> str:
    return vocabulary.get(token, f"#{token}")


def _top_ids(responses: Sequence[ScoredResponse]) -> list[int]:
    ids = [np.unique(ids) for r in responses for ids in (r.columns.top_base_ids, r.columns.top_rl_ids)]
    return np.unique(np.concatenate(ids)).tolist()


def _words(responses: Sequence[ScoredResponse], vocabulary: Mapping[int, str]) -> list[tuple[int, str]]:
    """Every (id, text) that the page shows, the frequent ones first."""
    counts: Counter[tuple[int, str]] = Counter()
    for r in responses:
        counts.update(zip(np.asarray(r.columns.token).tolist(), r.pieces, strict=True))
        for ids in (r.columns.top_base_ids, r.columns.top_rl_ids):
            for token, count in zip(*np.unique(ids, return_counts=True), strict=True):
                counts[int(token), _text(vocabulary, int(token))] += int(count)
    return [word for word, _ in counts.most_common()]


def _largest_rank(response: ScoredResponse) -> int:
    ranks = np.concatenate([response.columns.rank_base, response.columns.rank_rl])
    return int(ranks.max(initial=1))


def _layout(top: int, wide: Mapping[str, int]) -> list[dict[str, Any]]:
    """The columns of a response's block in their order: name, kind, bytes a value, values a token."""
    return [
        {"name": "word", "kind": "whole", "bytes": wide["word"], "values": 1},
        {"name": "logp_base", "kind": "float", "bytes": 4, "values": 1},
        {"name": "logp_rl", "kind": "float", "bytes": 4, "values": 1},
        *({"name": name, "kind": "float", "bytes": 3, "values": 1} for name in _FLOATS),
        *({"name": name, "kind": "whole", "bytes": wide["rank"], "values": 1} for name in ("rank_base", "rank_rl")),
        *(
            column
            for model in ("base", "rl")
            for column in (
                {"name": f"top_{model}", "kind": "whole", "bytes": wide["word"], "values": top},
                {"name": f"top_{model}_logp", "kind": "half", "bytes": 2, "values": top},
            )
        ),
    ]


def _planes(
    r: ScoredResponse,
    index: Mapping[tuple[int, str], int],
    by_id: Mapping[int, int],
    wide: Mapping[str, int],
) -> bytes:
    """A response's columns as `_layout` lists them. Of [T, K] columns first all firsts, then all seconds, ..."""
    columns = r.columns

    def places(ids_TK: np.ndarray) -> np.ndarray:
        unique, inverse = np.unique(ids_TK, return_inverse=True)
        table = np.array([by_id[token] for token in unique.tolist()], np.uint32)
        return table[inverse.reshape(ids_TK.shape)].T if unique.size else np.zeros(0, np.uint32)

    words = [index[word] for word in zip(np.asarray(columns.token).tolist(), r.pieces, strict=True)]
    parts = [_split(np.array(words, np.uint32), wide["word"])]
    parts += [_split(_float_bits(x, 4), 4) for x in (columns.logp_base, columns.logp_rl)]
    parts += [_split(_float_bits(getattr(columns, name), 3), 3) for name in _FLOATS]
    parts += [_split(np.asarray(x, np.uint32), wide["rank"]) for x in (columns.rank_base, columns.rank_rl)]
    for ids_TK, logp_TK in (
        (columns.top_base_ids, columns.top_base_logp),
        (columns.top_rl_ids, columns.top_rl_logp),
    ):
        parts += [_split(places(np.asarray(ids_TK)), wide["word"]), _split(_half_bits(logp_TK).T, 2)]
    return b"".join(parts)


def _float_bits(values: ArrayLike, keep: int) -> np.ndarray:
    """The upper `keep` bytes of float32, rounded to nearest, as whole numbers."""
    floats = np.ascontiguousarray(values, np.float32)
    bits = floats.view(np.uint32).astype(np.uint64)
    drop = 8 * (4 - keep)
    rounded = np.where(np.isfinite(floats), bits + (1 << drop >> 1), bits)
    return (rounded >> drop).astype(np.uint32)


def _half_bits(values: ArrayLike) -> np.ndarray:
    logp = np.asarray(values, np.float32)
    coarse = np.where(np.isfinite(logp) & (logp < _UNLIKELY), np.round(logp * _COARSE) / _COARSE, logp)
    return coarse.astype(np.float16).view(np.uint16)


def _split(values: np.ndarray, width: int) -> bytes:
    """The lowest byte of every value, then the next one of every value, ...: equal bytes lie together for gzip."""
    flat = np.ascontiguousarray(values).reshape(-1).astype("<u4")
    return flat.view(np.uint8).reshape(-1, 4)[:, :width].T.tobytes()


def _bytes_for(largest: int) -> int:
    return max(1, -(-int(largest).bit_length() // 8))


def _extents(responses: Sequence[ScoredResponse]) -> dict[str, dict[str, float]]:
    """Of every criterion, over the page's tokens: where the colours end (99% lie inside), what a slider spans, and the
    threshold that it starts with (5% are selected)."""
    out: dict[str, dict[str, float]] = {}
    for name in _COLOURED:
        with np.errstate(invalid="ignore"):  # a token that neither model allows has no dlogp
            values = np.concatenate([np.asarray(getattr(r.columns, name), np.float64) for r in responses])
        values = values[np.isfinite(values)]
        if not values.size:
            values = np.zeros(1)
        if CRITERIA[name].signed:
            # The colours' range is symmetric, so that the middle is "no difference".
            size = _ceiling(float(np.quantile(np.abs(values), 0.99)))
            low, high = (float(x) for x in np.quantile(values, (0.0005, 0.9995)))
            out[name] = {"colour": size, "low": -_ceiling(-low), "high": _ceiling(high)}
        else:
            start, size, high = (_ceiling(float(x)) for x in np.quantile(values, (0.95, 0.99, 0.9995)))
            out[name] = {"colour": size, "low": 0.0, "high": high, "start": start}
    return out


def _ceiling(value: float) -> float:
    """The next number of two digits that is not smaller; at least 0.1, so that a scale of zeros is still one."""
    if not value > 0.1:
        return 0.1
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / unit - 1e-9) * unit, 6)


def _block(name: str, data: bytes) -> bytes:
    packed = base64.b64encode(gzip.compress(data, 6, mtime=0))
    return f'<script type="application/gzip" id="{name}">'.encode() + packed + b"</script>\n"


def _asset(name: str) -> str:
    return resources.files("rlvr_jax.microscope").joinpath("assets", name).read_text(encoding="utf-8")


def _joined_scripts() -> str:
    return '"use strict";\n(() => {\n' + "\n".join(_asset(name) for name in _SCRIPTS) + "})();\n"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Replaces every `{{name}}` once, in one pass: a value that looks like a placeholder stays as it is."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
