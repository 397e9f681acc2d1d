"""The file of the microscope's page: that it holds the numbers, and nothing that can run or fetch."""

import base64
import gzip
import hashlib
import json
import re

import numpy as np
import pytest

from rlvr_jax.microscope.page import write_page
from tests.scored_responses import FIGURE, HOSTILE, TEXT, scored, small_page, vocabulary


def blocks(html: str) -> dict[str, bytes]:
    found = re.findall(r'<script type="application/gzip" id="([\w-]+)">([^<]*)</script>', html)
    return {name: gzip.decompress(base64.b64decode(data)) for name, data in found}


def unpacked(manifest: dict, data: bytes, length: int) -> dict[str, np.ndarray]:
    """A response's columns from its byte planes, read here as the page reads them."""
    out, offset = {}, 0
    for column in manifest["layout"]:
        count, width = length * column["values"], column["bytes"]
        planes = np.frombuffer(data, np.uint8, count * width, offset).reshape(width, count).astype(np.uint32)
        whole = (planes << (8 * np.arange(width, dtype=np.uint32))[:, None]).sum(0).astype(np.uint32)
        if column["kind"] == "float":
            whole = (whole << 8 * (4 - width)).astype(np.uint32).view(np.float32)
        elif column["kind"] == "half":
            whole = whole.astype(np.uint16).view(np.float16).astype(np.float32)
        out[column["name"]] = whole if column["values"] == 1 else whole.reshape(column["values"], length).T
        offset += count * width
    assert offset == len(data)
    return out


def test_the_file_holds_the_numbers(tmp_path):
    responses = small_page()
    size = write_page(tmp_path / "page.html", responses, vocabulary=vocabulary(), figures=[FIGURE])
    html = (tmp_path / "page.html").read_text()
    assert size == len(html.encode())
    parts = blocks(html)
    manifest = json.loads(parts["manifest"])
    ids, texts = manifest["words"]["ids"], manifest["words"]["texts"]
    for i, r in enumerate(responses):
        got = unpacked(manifest, parts[f"response-{i}"], len(r.pieces))
        assert [texts[w] for w in got["word"]] == r.pieces
        np.testing.assert_array_equal(np.array(ids)[got["word"]], r.columns.token)
        for name in ("logp_base", "logp_rl", "rank_base", "rank_rl"):
            np.testing.assert_array_equal(got[name], getattr(r.columns, name), err_msg=name)
        for name in ("entropy_base", "entropy_rl", "kl", "kl_reverse", "js", "js_true", "gradient_share"):
            np.testing.assert_allclose(got[name], getattr(r.columns, name), rtol=2.0**-16, atol=0, err_msg=name)
        for model in ("base", "rl"):
            np.testing.assert_array_equal(np.array(ids)[got[f"top_{model}"]], getattr(r.columns, f"top_{model}_ids"))
            logp, kept = getattr(r.columns, f"top_{model}_logp"), got[f"top_{model}_logp"]
            np.testing.assert_allclose(kept[logp >= -7], logp[logp >= -7], rtol=2.0**-11, atol=1e-7)
            np.testing.assert_allclose(np.exp(kept), np.exp(logp), rtol=0.035, atol=1e-7)
    delta = np.concatenate([r.columns.delta_logp for r in responses])
    inside = np.mean(np.abs(delta[np.isfinite(delta)]) <= manifest["extents"]["delta_logp"]["colour"])
    assert 0.99 <= inside < 1


def test_the_file_can_run_and_fetch_nothing_but_its_own_script(tmp_path):
    title = f"{HOSTILE} {{{{data}}}} {{{{script}}}}"
    write_page(tmp_path / "page.html", small_page(), vocabulary={}, title=title, note=HOSTILE)
    html = (tmp_path / "page.html").read_text()
    assert "<img" not in html
    assert not re.search(r"https?:|@import|url\(", html)
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert f"script-src 'sha256-{digest}'" in policy[1]
    assert "unsafe" not in policy[1]
    assert json.loads(blocks(html)["manifest"])["title"] == title


@pytest.mark.parametrize(
    ("responses", "complaint"),
    [
        (lambda one: [], "responses is empty"),
        (lambda one: [one, one], "problem 0, sample 0, source 'rl' is there twice"),
        (lambda one: [one._replace(pieces=one.pieces[:-1])], "column token has"),
        (lambda one: [one, scored(1, 0, "rl", TEXT, top=3)], "problem 1.*alternatives"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path, responses, complaint):
    with pytest.raises(ValueError, match=complaint):
        write_page(tmp_path / "page.html", responses(scored(0, 0, "rl", TEXT)), vocabulary={})
    assert not list(tmp_path.iterdir())
