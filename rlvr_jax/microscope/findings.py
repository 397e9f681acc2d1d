"""What a diagnosis says, as plain numbers: section 3 of arXiv 2603.22117 for any pair, with intervals over problems.

On rl's responses E[dlogp] >= 0 and on base's E[dlogp] <= 0 whatever the pair (they are a KL divergence and minus one,
where responses are sampled at temperature 1 from the whole distribution). So a mean of either sign shows nothing: what
is reported is how far the two histograms overlap and what lies in their tails, for dlogp and the magnitudes alike.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from rlvr_jax.criteria import CRITERIA, MEASURED
from rlvr_jax.evaluation import Interval, mean_interval
from rlvr_jax.microscope import statistics
from rlvr_jax.microscope.files import TokenTable

METRICS = ("entropy_base", "entropy_rl", "kl", "kl_reverse", "js_true", "delta_logp")
COMPARED = tuple(name for name in MEASURED if name != "neg_delta_logp")  # which is delta_logp from the other side
THRESHOLDS = (0.3, 1.0)  # nats of dlogp; the first is the published tau of DAPO-Qwen-32B
BINS = 61  # odd, so that dlogp has a bin around 0
PROBABILITY_BINS = 20
POSITION_BINS = 20


class Options(NamedTuple):
    """What the findings are taken at.

    Attributes:
      tail: share of all tokens that count as a metric's tail (of dlogp, the largest absolute values).
      rate: share of tokens that each criterion selects for the comparison of criteria, and that "high dlogp" means.
      extremes: tokens listed at either end of dlogp.
      context: tokens shown before and after them.
      confidence: of the intervals.
      resamples, seed: of the bootstrap that the intervals of overlaps come from.
    """

    tail: float = 0.05
    rate: float = 0.05
    extremes: int = 20
    context: int = 12
    resamples: int = 2_000
    confidence: float = 0.95
    seed: int = 0


def findings(table: TokenTable, options: Options | None = None) -> dict[str, Any]:
    """All findings as JSON-able values.

    Tokens where a model's logits are not finite are left out and counted in `left_out`.

    Raises:
      ValueError: no token is left.
    """
    options = options or Options()
    data = _Data(table, options)
    out: dict[str, Any] = {
        "tokens": len(data.problem),
        "left_out": data.left_out,
        "responses": len(table.responses),
        "problems": data.problems,
        "sources": {
            name: {
                "responses": sum(r.source == name for r in table.responses),
                "tokens": int((data.source == i).sum()),
                "mean_delta_logp": data.mean(data.values["delta_logp"], data.source == i),
            }
            for i, name in enumerate(data.sources)
        },
        "options": options._asdict(),
        "histograms": {name: _histograms(data, name) for name in METRICS},
        "delta_logp_tails": _tails(data),
        "gradient": {name: _gradient(data, i) for i, name in enumerate(data.sources)},
        "high_delta_logp": {name: _high(data, i) for i, name in enumerate(data.sources)},
        "position": {name: _position(data, i) for i, name in enumerate(data.sources)},
        "agreement": {name: _agreement(data, i) for i, name in enumerate(data.sources)},
        "extremes": _extremes(data),
        "token_types": _token_types(data),
    }
    return out


class _Data:
    """The finite tokens, with their problem as 0, 1, ... and their source as a place in `sources`."""

    def __init__(self, table: TokenTable, options: Options):
        finite = np.all([np.isfinite(x) for x in table.values.values()], axis=0)
        self.table, self.options = table, options
        self.left_out = int((~finite).sum())
        (self.rows,) = np.nonzero(finite)  # places in the table
        if not len(self.rows):
            raise ValueError("no token with finite numbers under both models: nothing can be found")
        self.values = {name: x[finite] for name, x in table.values.items()}
        self.response = table.response[finite]
        numbers, problem_R = np.unique([r.problem for r in table.responses], return_inverse=True)
        self.problems = len(numbers)
        self.problem = problem_R[self.response]
        there = {table.responses[i].source for i in np.unique(self.response)}  # with a token to look at
        self.sources = sorted(there, key=_source_order)
        places = {name: i for i, name in enumerate(self.sources)}
        self.source = np.array([places.get(r.source, -1) for r in table.responses])[self.response]
        self.lengths = np.array([r.length for r in table.responses])

    def means(
        self, values: np.ndarray, weights: np.ndarray, bounds: tuple[float, float] | None = (0.0, 1.0)
    ) -> dict[str, Any]:
        """`mean_interval` of each column of a problem's sums `[P, ...]`, as JSON-able values."""
        values, weights = np.broadcast_arrays(values, weights)
        found = np.empty((3, *values.shape[1:]))
        for at in np.ndindex(values.shape[1:]):
            column = (slice(None), *at)
            found[column] = mean_interval(
                values[column], weights[column], bounds=bounds, confidence=self.options.confidence
            )
        return plain(Interval(*found))

    def sums(self, values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """[P, ...] of the chosen tokens."""
        return statistics.sum_by_group(values[chosen], self.problem[chosen], self.problems)

    def counts(self, name: str, edges: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """[P, bins] of the chosen tokens."""
        return self.padded(statistics.histogram(self.values[name][chosen], edges, groups=self.problem[chosen]))

    def padded(self, counts: np.ndarray) -> np.ndarray:
        """Problems that have no such token are zeros."""
        return np.concatenate([counts, np.zeros((self.problems - len(counts), *counts.shape[1:]))])

    def mean(self, values: np.ndarray, chosen: np.ndarray, bounds: tuple[float, float] | None = None) -> dict[str, Any]:
        """The mean of the chosen tokens and its interval."""
        return self.means(self.sums(values, chosen), self.sums(np.ones(len(chosen)), chosen), bounds)

    def share(self, hit: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
        """The share of the chosen tokens that are hit, and its interval."""
        return self.mean(hit, chosen, (0.0, 1.0))


def plain(interval: Interval) -> dict[str, Any]:
    """An interval as JSON-able values: numbers, or lists where it has several; NaN as None."""

    def listed(x: Any) -> Any:
        if isinstance(x, list):
            return [listed(y) for y in x]
        return None if np.isnan(x) else float(x)

    return {name: listed(np.asarray(x).tolist()) for name, x in interval._asdict().items()}


def metric_edges(values: np.ndarray, *, signed: bool) -> np.ndarray:
    """Edges of equal bins up to the 99.9% quantile of the absolute values; what lies beyond counts in the end bins."""
    reach = float(np.quantile(np.abs(values), 0.999)) or float(np.abs(values).max()) or 1.0
    return np.linspace(-reach if signed else 0.0, reach, BINS + 1)


def _source_order(name: str) -> tuple:
    """base, rl, given; steps of training by number."""
    first, _, number = name.partition(" ")
    known = ("base", "rl", "given")
    return (known.index(name) if name in known else len(known), int(number) if number.isdigit() else 0, first)


def _histograms(data: _Data, name: str) -> dict[str, Any]:
    """Of one metric: counts by source; between base's and rl's responses the shared mass, of all and of the tail."""
    values, signed = data.values[name], name == "delta_logp"
    edges = metric_edges(values, signed=signed)
    by_source = [data.counts(name, edges, data.source == i) for i in range(len(data.sources))]
    out: dict[str, Any] = {
        "edges": edges.tolist(),
        "counts": {source: by_source[i].sum(0).astype(int).tolist() for i, source in enumerate(data.sources)},
    }
    size = np.abs(values)
    threshold = float(np.quantile(size, 1 - data.options.tail))
    out["tail_threshold"] = threshold
    tail = size >= threshold if threshold > 0 else size > 0
    out["tail_share"] = {source: data.share(tail, data.source == i) for i, source in enumerate(data.sources)}
    if {"base", "rl"} <= set(data.sources):
        pair = [data.sources.index("base"), data.sources.index("rl")]
        tails = [data.counts(name, edges, tail & (data.source == i)) for i in pair]
        for key, counts in (("overlap", [by_source[i] for i in pair]), ("overlap_tail", tails)):
            value, low, high = statistics.bootstrap(
                *(statistics.overlap, *counts),
                confidence=data.options.confidence,
                resamples=data.options.resamples,
                seed=data.options.seed,
            )
            # A resample has fewer different tokens, so it overlaps less: the interval lies on the other side.
            ends = np.clip([2 * value - high, 2 * value - low], 0, 1)
            out[key] = plain(Interval(value, *ends))
            out[f"{key}_if_alike"] = plain(
                statistics.overlap_if_alike(*counts, confidence=data.options.confidence, seed=data.options.seed)
            )
    return out


def _tails(data: _Data) -> dict[str, Any]:
    """Share of each source's tokens whose dlogp is at most -t and at least t."""
    delta = data.values["delta_logp"]
    return {
        source: [
            {"threshold": t, "below": data.share(delta <= -t, chosen), "above": data.share(delta >= t, chosen)}
            for t in THRESHOLDS
        ]
        for source, chosen in ((name, data.source == i) for i, name in enumerate(data.sources))
    }


def _writer(data: _Data, source: int) -> str:
    return "base" if data.sources[source] == "base" else "rl"


def _gradient(data: _Data, source: int) -> dict[str, Any]:
    """Tokens and gradient mass by probability under the model that wrote them; lemma 3.1 by itself is 1 - p."""
    chosen, writer = data.source == source, _writer(data, source)
    edges = np.linspace(0, 1, PROBABILITY_BINS + 1)
    tokens, mass = statistics.gradient_by_probability(
        data.values[f"logp_{writer}"][chosen], edges, groups=data.problem[chosen]
    )
    tokens, mass = data.padded(tokens), data.padded(mass)
    unlikely = edges[:-1] < 0.5
    return {
        "probability_of": writer,
        "edges": edges.tolist(),
        "token_share": data.means(tokens, tokens.sum(-1, keepdims=True)),
        "mass_share": data.means(mass, mass.sum(-1, keepdims=True)),
        "mass_per_token": data.means(mass, tokens),
        "tokens_below_half": data.means(tokens[:, unlikely].sum(-1), tokens.sum(-1)),
        "mass_below_half": data.means(mass[:, unlikely].sum(-1), mass.sum(-1)),
    }


def _high(data: _Data, source: int) -> dict[str, Any]:
    """Probabilities under both models of the source's tokens with the highest dlogp, the lowest, and all of them."""
    chosen, rate = data.source == source, data.options.rate
    delta, edges = data.values["delta_logp"], np.linspace(0, 1, PROBABILITY_BINS + 1)
    high, low = np.quantile(delta[chosen], [1 - rate, rate])
    groups = {"high": chosen & (delta >= high), "low": chosen & (delta <= low), "all": chosen}
    out: dict[str, Any] = {"edges": edges.tolist(), "thresholds": {"high": float(high), "low": float(low)}}
    for group, members in groups.items():
        out[group] = {"tokens": int(members.sum())}
        for model in ("base", "rl"):
            p = np.exp(np.minimum(data.values[f"logp_{model}"].astype(float), 0.0))  # a log-prob may round above 0
            counts = statistics.histogram(p[members], edges, groups=data.problem[members])
            mean = data.mean(p, members, (0.0, 1.0))
            out[group][f"p_{model}"] = {"counts": counts.sum(0).astype(int).tolist(), "mean": mean}
    return out


def _position(data: _Data, source: int) -> dict[str, Any]:
    """Mean dlogp and mean absolute dlogp by the position as a share of the response, and by the position in tokens."""
    chosen = data.source == source
    position = data.table.position[data.rows].astype(float)
    delta = data.values["delta_logp"].astype(float)
    relative = (position + 0.5) / data.lengths[data.response]
    longest = max(int(position[chosen].max()) + 1, 1)
    powers = 2.0 ** np.arange(0, np.ceil(np.log2(longest)) + 1)
    edges = {
        "relative": np.linspace(0, 1, POSITION_BINS + 1),
        "absolute": np.concatenate([[0.0], powers]) if longest > 1 else np.array([0.0, 1.0]),
    }
    out: dict[str, Any] = {}
    for name, place in (("relative", relative), ("absolute", position)):
        args = (place[chosen], edges[name])
        groups = data.problem[chosen]
        tokens = data.padded(statistics.histogram(*args, groups=groups))
        sums = {
            key: data.padded(statistics.histogram(*args, groups=groups, weights=x[chosen]))
            for key, x in (("mean", delta), ("mean_absolute", np.abs(delta)))
        }
        out[name] = {"edges": edges[name].tolist(), "tokens": tokens.sum(0).astype(int).tolist()}
        out[name] |= {key: data.means(x, tokens, None) for key, x in sums.items()}
    return out


def criterion_numbers(values: dict[str, np.ndarray], criterion: str) -> np.ndarray:
    """What a criterion compares with its threshold."""
    of_delta = CRITERIA[criterion].of_delta
    return values[criterion] if of_delta is None else np.asarray(of_delta(jnp.asarray(values["delta_logp"])))


def _agreement(data: _Data, source: int) -> dict[str, Any]:
    """Which tokens each criterion selects at one rate, and the Jaccard index of every two."""
    chosen = data.source == source
    found = [
        statistics.select_share(name, criterion_numbers(data.values, name)[chosen], data.options.rate)
        for name in COMPARED
    ]
    both, either = statistics.agreement([x.selected for x in found], data.problem[chosen], data.problems)
    rate = data.options.rate
    return {
        "criteria": list(COMPARED),
        "tau": [x.tau for x in found],
        "share": [x.share for x in found],
        "jaccard": data.means(both, either),
        "jaccard_by_chance": rate / (2 - rate),
    }


def _extremes(data: _Data) -> dict[str, Any]:
    """Tokens of the most extreme dlogp at either end, at most one a response, with what stands around them."""
    table, delta = data.table, data.values["delta_logp"]
    starts = np.concatenate([[0], np.cumsum(data.lengths)])
    out: dict[str, Any] = {}
    for end, order in (("highest", np.argsort(-delta, kind="stable")), ("lowest", np.argsort(delta, kind="stable"))):
        listed, seen = [], set()
        for i in order:
            if (delta[i] <= 0) if end == "highest" else (delta[i] >= 0):
                break
            response = int(data.response[i])
            if response in seen:
                continue
            seen.add(response)
            row, one = int(data.rows[i]), table.responses[response]
            begin, stop = max(starts[response], row - data.options.context), starts[response + 1]
            listed.append(
                {
                    **{"problem": one.problem, "sample": one.sample, "source": one.source, "correct": one.correct},
                    "position": int(table.position[row]),
                    "token": table.text[row].as_py(),
                    "before": _joined(table.text[begin:row]),
                    "after": _joined(table.text[row + 1 : min(stop, row + 1 + data.options.context)]),
                    **{key: float(table.values[key][row]) for key in ("delta_logp", "logp_base", "logp_rl", "kl")},
                    **{key: int(table.values[key][row]) for key in ("rank_base", "rank_rl")},
                }
            )
            if len(listed) == data.options.extremes:
                break
        out[end] = listed
    return out


def _joined(texts: pa.ChunkedArray) -> str:
    return "".join(texts.to_pylist())


def _token_types(data: _Data) -> dict[str, Any]:
    """Tokens of the vocabulary by their mean dlogp, among those that occur often enough in several problems."""
    token, delta = data.table.token[data.rows], data.values["delta_logp"].astype(float)
    ids, first, place, counts = np.unique(token, return_index=True, return_inverse=True, return_counts=True)
    pairs = np.unique(np.stack([place, data.problem]), axis=1)
    in_problems = np.bincount(pairs[0], minlength=len(ids))
    means = np.bincount(place, delta) / counts
    least = max(5, len(token) // 10_000)
    often = np.nonzero((counts >= least) & (in_problems >= min(3, data.problems)))[0]
    out: dict[str, Any] = {"at_least": least}
    for end, order in (("highest", often[np.argsort(-means[often])]), ("lowest", often[np.argsort(means[often])])):
        kept: Sequence[int] = [i for i in order if (means[i] > 0) == (end == "highest")][: data.options.extremes]
        out[end] = [
            {
                "token": data.table.text[int(data.rows[first[i]])].as_py(),
                "id": int(ids[i]),
                "count": int(counts[i]),
                "problems": int(in_problems[i]),
                "mean_delta_logp": data.mean(delta, place == i),
            }
            for i in kept
        ]
    return out
