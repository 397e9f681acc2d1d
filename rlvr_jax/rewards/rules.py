"""Answer extraction and DAPO's string rule: pure functions of text.

Only the standard library is imported, because the grading worker loads this file by its path, without the package.
"""

import re

PREDICTION_LIMIT = 2000  # characters; answers of the MATH test set stay below 160
TAGGED_LIMIT = 20_000  # characters; some reasoning-gym answers are grids of 30 x 30 cells
DAPO_TAIL = 300  # characters of the response that DAPO's rule looks at
DAPO_MISSING = "[INVALID]"

# The tasks of reasoning-gym 0.1.25 whose scorers evaluate the text of an answer as Python: the first four by `eval`,
# the others by sympy's `parse_expr`. `tests/test_rewards_canaries.py` looks for others.
EVALUATING_TASKS = frozenset(
    (
        *("binary_matrix", "n_queens", "spiral_matrix", "string_insertion"),
        *("countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"),
    )
)

_BRACE = re.compile(r"[{}]")
_ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

# The published normalisation as data (order matters): literal replacements, then literal removals.
_REPLACEMENTS = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
)
_REMOVALS = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3"),
    *("\\text{\n}", "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots"),
)
# What is between the first two dollars of a line replaces the line; a text command leaves its content;
# \frac12 and \sqrt2 gain their braces.
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[^$\n]*\$([^$\n]*)\$.*", r"$\1$"),
        (r"\\text\{([^}\n]*)\}", r"\1"),
        (r"\\textbf\{([^}\n]*)\}", r"\1"),
        (r"\\overline\{([^}\n]*)\}", r"\1"),
        (r"\\boxed\{(.*)\}", r"\1"),
        (r"frac([^{])(.)", r"frac{\1}{\2}"),
        (r"sqrt([^{])", r"sqrt{\1}"),
    )
)


def last_boxed(text: str, limit: int = PREDICTION_LIMIT) -> tuple[str | None, str | None]:
    r"""The content of the last `\boxed{...}` of a text, as `(content, error)`.

    The last occurrence of `\boxed` counts even when it is malformed: with no brace right after it, or none that
    closes it, the content is None. At most `limit` characters of content are looked at, so the time taken is
    bounded; a longer one gives None and an error.
    """
    found = text.rfind("\\boxed")
    if found < 0:
        return None, None
    start = found + len("\\boxed")
    if not text.startswith("{", start):
        return None, None
    depth = 0
    for brace in _BRACE.finditer(text, start, start + limit + 2):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[start + 1 : brace.start()], None
    if len(text) > start + limit + 2:
        return None, f"the last \\boxed{{...}} does not close within {limit} characters"
    return None, None


def final_answer(text: str, limit: int = TAGGED_LIMIT) -> tuple[str | None, str | None]:
    r"""The final answer of a response in one of three forms, as `(answer, error)`; the first that is there counts.

    1. what stands in the last closed `<answer>...</answer>`;
    2. the content of the last `\boxed{...}`, if there is a `\boxed` at all (see `last_boxed`);
    3. the last line that has `Answer:` in it (any case), from there on.

    Spaces around it are dropped. More than `limit` characters give None and an error. The time taken is linear.
    """
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        found = text[start + len("<answer>") : end]
    elif "\\boxed" in text:
        found, error = last_boxed(text, limit)
        if error is not None:
            return None, error
    else:
        lines = _ANSWER_LINE.findall(text)
        found = lines[-1] if lines else None
    if found is not None and len(found) > limit:
        return None, f"the answer has more than {limit} characters"
    return None if found is None else found.strip(), None


def dapo_normalize(answer: str) -> str:
    """DAPO's published normal form of an answer (the Minerva normalisation), after its last `=`."""
    answer = answer.split("=")[-1]
    for before, after in _REPLACEMENTS:
        answer = answer.replace(before, after)
    for removed in _REMOVALS:
        answer = answer.replace(removed, "")
    for pattern, replacement in _REWRITES:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return (digits if digits.isdigit() else answer).strip()


def dapo_prediction(response: str) -> str | None:
    """The text after the last `Answer:` within the last 300 characters, not yet normalised, or None."""
    lines = _ANSWER_LINE.findall(response[-DAPO_TAIL:])
    return lines[-1] if lines else None


def dapo_verdict(prediction: str | None, answer: str) -> tuple[bool, str | None]:
    """`(correct, normalised prediction)` by equality of normal forms; a missing prediction stands for "[INVALID]"."""
    normalized = dapo_normalize(DAPO_MISSING if prediction is None else prediction)
    return normalized == dapo_normalize(answer), None if prediction is None else normalized
