"""Responses that a grader must survive, made from a seed: hostile, random, and valid ones among them."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

PIECES = [
    *(
        "{",
        "}",
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "$",
        "\\",
        "^",
        "_",
        "&",
        "%",
        "#",
        "~",
        "|",
        "=",
        "<",
        ">",
        ",",
        ".",
        "!",
    ),
    *(
        "\\boxed",
        "\\boxed{",
        "\\frac",
        "\\frac{",
        "\\sqrt",
        "\\sqrt[",
        "\\left(",
        "\\right)",
        "\\text{",
        "\\begin{",
        "\\end{",
    ),
    *(
        "pmatrix}",
        "\\\\",
        "\\pm",
        "\\cup",
        "\\infty",
        "\\sum_{n=1}^{",
        "\\int_0^1",
        "\\lim_{x\\to 0}",
        "\\log",
        "\\sin",
    ),
    *(
        "Answer:",
        "Answer: ",
        "<answer>",
        "</answer>",
        "\n",
        "\t",
        " ",
        "0",
        "1",
        "2",
        "9",
        "x",
        "y",
        "i",
        "e",
        "n!",
        "dx",
    ),
    *("\0", "\x1b[2J", "\x7f", "\r", "\u202e", "\u200b", "\ufeff", "½", "π", "−", "５", "日本", "é", "\U0001f600"),
]


class Case(NamedTuple):
    """`expected` is the verdict of a valid answer, None for text of which only survival is asked."""

    kind: str
    response: str
    answer: str
    expected: bool | None = None


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """`count` cases, the kinds in turn with their weights; the same for the same seed."""
    rng = random.Random(seed)
    kinds = list(WEIGHTS)
    for _ in range(count):
        kind = rng.choices(kinds, [weight for _, weight in WEIGHTS.values()])[0]
        made = WEIGHTS[kind][0](rng)
        yield made if isinstance(made, Case) else _wrap(rng, kind, made)


def _wrap(rng: random.Random, kind: str, text: str) -> Case:
    answer = rng.choice(["42", "\\frac{1}{2}", "(0,1)", text[:200]]) if rng.random() < 0.3 else "42"
    response = rng.choice(
        [
            f"So $\\boxed{{{text}}}$.\nAnswer: {text}",
            f"So $\\boxed{{{text}}}$.\nAnswer: {text}",
            f"\\boxed{{1}} {text} \\boxed{{{text}",
            text,
        ]
    )
    return Case(kind, response, answer)


def _valid(rng: random.Random) -> Case:
    k = rng.randrange(1, 10**6)
    right = rng.random() < 0.5
    answer = str(k if right else k + 1)
    written = rng.choice([str(k), f"{k:,}", f" {k} ", f"\\text{{{k}}}"])
    return Case("valid", f"Thus $\\boxed{{{written}}}$.\nAnswer: {written}", answer, right)


def _braces(rng: random.Random) -> str:
    depth = rng.randrange(1, 990)
    opening, closing = rng.choice(["{}", "()", "[]", ("\\left(", "\\right)"), ("\\{", "\\}"), "||"])
    return opening * depth + rng.choice(["", "1", "x"]) + closing * (depth + rng.choice([-1, 0, 0, 1]))


def _tower(rng: random.Random) -> str:
    levels = [str(rng.randrange(2, 100)) for _ in range(rng.randrange(2, 8))]
    return "^{".join(levels) + "}" * (len(levels) - 1)


def _huge(rng: random.Random) -> str:
    digits = rng.randrange(3, 2000)
    number = "".join(rng.choice("123456789") for _ in range(digits))
    form = [
        "{n}",
        "{n}.{n}",
        "\\frac{{{n}}}{{{n}}}",
        "-{n}",
        "{s}!",
        "{s}!!",
        "\\binom{{{s}}}{{{t}}}",
        "1e{s}",
        "10^{{{s}}}",
    ]
    short = str(rng.randrange(10, 10 ** rng.randrange(2, 9)))
    return rng.choice(form).format(n=number, s=short, t=short[:-1] or "1")


def _unicode(rng: random.Random) -> str:
    return "".join(
        chr(rng.randrange(0xD7FF)) if rng.random() < 0.9 else chr(rng.randrange(0xE000, 0x110000))
        for _ in range(rng.randrange(1, 200))
    )


def _control(rng: random.Random) -> str:
    return "".join(
        chr(rng.randrange(32)) if rng.random() < 0.5 else rng.choice("42{}\\$") for _ in range(rng.randrange(1, 100))
    )


def _long(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 4))) * rng.randrange(1, 5000)


def _deep(rng: random.Random) -> str:
    before, after = rng.choice(
        [
            ("\\frac{", "}{2}"),
            ("\\sqrt{", "}"),
            ("\\left(", "+1\\right)"),
            ("-(", ")"),
            ("x^{", "}"),
            ("\\sin(", ")"),
            ("\\text{", "}"),
        ]
    )
    depth = rng.randrange(1, 250)
    return before * depth + rng.choice("12x") + after * depth


def _slow(rng: random.Random) -> str:
    n = rng.randrange(10**3, 10**7)
    return rng.choice(
        [
            f"(x+1)^{{{n}}}",
            f"\\sum_{{k=1}}^{{{n}}} k^{{{rng.randrange(100)}}}",
            f"\\prod_{{k=1}}^{{{n}}} k",
            f"\\int_0^{{{n}}} \\sin(x^{{{rng.randrange(9)}}}) e^{{x}} dx",
            f"\\lim_{{x\\to 0}} \\frac{{\\sin(x^{{{rng.randrange(99)}}})}}{{x}}",
            f"\\sqrt[{n}]{{{n + 1}}} + \\sqrt[{n + 2}]{{{n + 3}}}",
            f"\\log_{{{n}}} {{{n}^{{{n}}}}}",
            f"\\cos^{{{n}}} x + \\sin^{{{n}}} x",
            f"{n}^{{{n}}} \\mod {n + 1}",
            "\\begin{pmatrix}" + "&".join(f"{n + i}^{{{i}}}" for i in range(rng.randrange(2, 40))) + "\\end{pmatrix}",
            ",".join(str(rng.randrange(100)) for _ in range(rng.randrange(2, 400))),
            "+".join(f"\\sqrt{{{rng.randrange(1, 10**6)}}}" for _ in range(rng.randrange(2, 12))),
            "=".join(f"x^{{{rng.randrange(9)}}}" for _ in range(rng.randrange(2, 100))),
        ]
    )


def _soup(rng: random.Random) -> str:
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 120)))


def _bytes(rng: random.Random) -> str:
    return rng.randbytes(rng.randrange(1, 300)).decode(rng.choice(["latin-1", "utf-8", "utf-16-le"]), "replace")


def _surrogates(rng: random.Random) -> str:
    return rng.randbytes(rng.randrange(1, 100)).decode("utf-8", "surrogateescape")


WEIGHTS: dict[str, tuple[Callable[[random.Random], str | Case], float]] = {
    "valid": (_valid, 20),
    "soup": (_soup, 30),
    "braces": (_braces, 2),
    "tower": (_tower, 1),
    "huge": (_huge, 3),
    "unicode": (_unicode, 10),
    "control": (_control, 8),
    "long": (_long, 5),
    "deep": (_deep, 2),
    "slow": (_slow, 2),
    "bytes": (_bytes, 11),
    "surrogates": (_surrogates, 6),
}
SLOW_KINDS = ("braces", "tower", "huge", "deep", "slow")  # of which a third run into a limit of 1 s
