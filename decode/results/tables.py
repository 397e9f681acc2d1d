"""The records of settings as a table: one line per setting, and of long lists the ones that are looked for first."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from rlvr_jax.evaluation import NOT_KNOWN
from rlvr_jax.runs.tables import Column, fitted, whole

MOST = 16  # settings that are printed
_ROLES = (("rl", "- rl", 1), ("base", "- base", 3), ("gamma0", "- g0", 4))  # role, heading, rank


def print_settings(screen: Console, records: Sequence[dict[str, Any]], file: object) -> None:
    """Prints the table of a summary or a comparison, as far as it fits; `file` has the whole (`settings_text`)."""
    shown = chosen(records)
    table, left_out = fitted(_title(records), _columns(shown), screen.width)
    screen.print(table)
    less = [f"{len(records) - len(shown)} more settings"] if len(shown) < len(records) else []
    less += [f"the columns {', '.join(left_out)}"] if left_out else []
    said = f"{' and '.join(less)}: {file}" if less else f"table: {file}"
    screen.print(said, markup=False, highlight=False, soft_wrap=True)


def settings_text(records: Sequence[dict[str, Any]]) -> str:
    """The table of all records with all columns."""
    return whole(_title(records), _columns(records)) if records else ""


def chosen(records: Sequence[dict[str, Any]], most: int = MOST) -> list[dict[str, Any]]:
    """At most so many records, in their order: all, or the models alone and the best of each criterion and gamma.

    The best of several is better by chance too, so this is a choice of what is read first and not a result.
    """
    if len(records) <= most:
        return list(records)
    groups: dict[tuple, list[int]] = {}
    for place, record in enumerate(records):
        alone = record["criterion"] in (None, "none")
        key = (place,) if alone else (record.get("run"), record["criterion"], record["gamma"], record["sample_from"])
        groups.setdefault((not alone, *key), []).append(place)
    best = [max(places, key=lambda place: records[place]["avg_at_k"]) for places in groups.values()]
    of_pair = {place for key, places in groups.items() if key[0] for place in places}
    best.sort(key=lambda place: (place in of_pair, -records[place]["avg_at_k"]))
    return [records[place] for place in sorted(best[:most])]


def percent(share: float) -> str:
    """A share for a table."""
    return f"{100 * share:.1f}"


def ranged(value: float, interval: Sequence[float] | None) -> str:
    """A share and its interval, for a table."""
    return f"{percent(value)} {NOT_KNOWN if interval is None else '-'.join(map(percent, interval))}"


def signed(found: dict[str, Any] | None) -> str:
    """A difference and its interval, for a table; empty where there is none."""
    if not found:
        return ""
    interval = found["interval"]
    ends = NOT_KNOWN if interval is None else " ".join(f"{100 * end:+.1f}" for end in interval)
    return f"{100 * found['difference']:+.1f} {ends}"


def _title(records: Sequence[dict[str, Any]]) -> str:
    k = _k(records)
    title = f"{records[0]['problems']} problems, {k} samples each\nshares in %, 95% intervals over problems"
    against = {record["difference"]["against"] for record in records if "difference" in record}
    if against:
        said = against.pop() if len(against) == 1 else "rl alone, sampled in the same way"
        many = len({record["run"] for record in records}) > 1
        title += f"\ndifference: Avg@{k} less that of {said if many else said.rpartition('/')[2]}, paired"
    return title


def _k(records: Sequence[dict[str, Any]]) -> str:
    ks = {record["k"] for record in records}
    return str(ks.pop()) if len(ks) == 1 else "k"


def _columns(records: Sequence[dict[str, Any]]) -> list[Column]:
    """`- rl`, `- base`, `- g0`: Avg@k less that of the rl model, the base model, the same setting at gamma = 0.

    `ended`: share of responses that drew a stop. Controls are marked `c`, unfinished settings `*`.
    """
    k = _k(records)
    runs = [record.get("run", "") for record in records]
    marks = [
        ("" if record["role"] == "setting" else "c") + ("*" if record.get("unfinished") else "") for record in records
    ]
    pass_at_k = [(r["pass_at_k"][str(r["k"])], r["pass_intervals"][str(r["k"])]) for r in records]
    columns = [
        *([Column("run", runs, name=True)] if len(set(runs)) > 1 else []),
        Column("", marks, name=True),
        Column("setting", [record["setting"] for record in records], name=True),
        Column(f"Avg@{k}", [ranged(record["avg_at_k"], record["interval"]) for record in records]),
    ]
    differences = [signed(record.get("difference", {}).get("avg_at_k")) for record in records]
    if any(differences):
        columns.append(Column("difference", differences, 1))
    for role, heading, rank in _ROLES:
        cells = [signed(record.get("differences", {}).get(role, {}).get("avg_at_k")) for record in records]
        if any(cells):
            columns.append(Column(heading, cells, rank))
    return [
        *columns,
        Column("select", [percent(record["share_selected"]) for record in records], 2),
        Column("change", [percent(record["share_changed"]) for record in records], 5),
        Column(f"Pass@{k}", [ranged(*values) for values in pass_at_k], 6),
        Column(f"maj@{k}", [ranged(record["maj_at_k"], record["maj_interval"]) for record in records], 7),
        Column("ended", [percent(record["share_finished"]) for record in records], 8),
        Column("length", [f"{record['mean_length']:.0f}" for record in records], 9),
        Column("tok/s", [f"{record['tokens_per_second']:.0f}" for record in records], 10),
    ]
