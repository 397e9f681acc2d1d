"""Files as strangers write them: changed JSON values, and what a reader says of them."""

import copy

VALUES = (
    *(-1, 0, 1, 3, 2**31, 2**63, 10**30, 1.5, -0.0, 1e-320, 1e308, float("nan"), float("inf")),
    *(True, False, None, "", "8", "1e-6", [], [[]], [None], {}, {"a": []}, {"rope_type": ["yarn"]}),
)


def mutated(value, rng):
    """A JSON value with one place of it changed: another value, another key, a value gone or moved."""
    value = copy.deepcopy(value)
    places = [(value, key) for key in value]
    places += [(child, key) for child in value.values() if isinstance(child, dict) for key in child]
    places += [(x, i) for child in value.values() if isinstance(child, dict) for x in child.values()
               if isinstance(x, list) for i in range(len(x))]  # fmt: skip
    holder, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder[key], (int, float)):
        holder[key] = holder[key] * rng.choice([-1, 2, 1000, 2**40]) + rng.choice([0, 1, -1, 0.5])
    elif kind == 2 and isinstance(holder, dict):
        holder[rng.choice(list(holder))] = holder[key]
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def refusal(read):
    """(what was read, None), or (None, what the ValueError says)."""
    try:
        return read(), None
    except ValueError as error:
        return None, str(error)
