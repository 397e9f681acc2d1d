"""README and docs read at once: short sentences. Tables, code, headings and captions of figures are not counted."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "launch" / "README.md", ROOT / "benchmarks" / "README.md", *ROOT.glob("docs/*.md")]
)


def sentences(text: str) -> list[str]:
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("|", "#", "!")))
    text = re.sub(r"\]\([^)]*\)", "]", text)  # the places of links
    found = []
    text = re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)  # a point is a paragraph
    for paragraph in re.split(r"\n\s*\n", text):
        parts = re.split(r"(?<=[.?!])[*)]*\s+(?=[A-Z0-9`\"(\[*])", " ".join(paragraph.split()))
        found += [part for part in parts if len(part.split()) > 1]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short(page):
    found = sentences(page.read_text())
    lengths = [len(sentence.split()) for sentence in found]
    assert sum(lengths) / len(lengths) <= 18
    assert [sentence for sentence, words in zip(found, lengths, strict=True) if words > 35] == []


def test_how_sentences_are_counted():
    text = "# Head\n\nOne two three. Four\nfive [six](a/b.md)!\n\n* A point. `Code` b.\n\n| a | b |\n\n```\nx\n```\n"
    assert [len(one.split()) for one in sentences(text)] == [3, 3, 2, 2]
