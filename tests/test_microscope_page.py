"""The microscope's page in a browser.

The browser is Chromium or Chrome, where there is one; nothing is installed. Screenshots go to `artifacts/microscope`.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from rlvr_jax.microscope.columns import ScoredResponse
from rlvr_jax.microscope.page import write_page
from tests.scored_responses import FIGURE, HOSTILE, TEXT, made_of, small_page, vocabulary

ARTIFACTS = Path(__file__).parent.parent / "artifacts" / "microscope"
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
LOCAL = ("file:", "blob:", "data:", "about:")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def tab():
    """A tab of one browser that all tests share: starting another takes longer than a test."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `test` has it)")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        yield running.new_page()
        running.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, list[ScoredResponse]]:
    path, responses = tmp_path_factory.mktemp("page") / "page.html", small_page()
    write_page(path, responses, vocabulary=vocabulary(), figures=[FIGURE], title="A page", note="Two models.")
    return path, responses


@pytest.fixture
def show(tab, written):
    """Opens the page afresh: show("#hash", width=..., dark=...). An error or a request fails the test at its end."""
    troubles = []
    listeners = {
        "console": lambda message: message.type in ("error", "warning") and troubles.append(message.text),
        "pageerror": lambda error: troubles.append(str(error)),
        "request": lambda request: request.url.startswith(LOCAL) or troubles.append(request.url),
    }
    for event, listener in listeners.items():
        tab.on(event, listener)

    def opened(hash="", *, width=1280, height=800, dark=False):
        tab.goto("about:blank")
        tab.set_viewport_size({"width": width, "height": height})
        tab.emulate_media(color_scheme="dark" if dark else "light")
        tab.goto(written[0].as_uri() + hash)
        tab.wait_for_selector("html.complete")
        return tab

    yield opened
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    assert not troubles


def settle(page) -> None:
    """Until what the last action asked for is drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def choose(page, field: str, value: str) -> None:
    page.select_option(f"#{field}", value)
    settle(page)


def shown_tokens(page, pane="left") -> list[dict]:
    """The tokens in the document: number, text, whether selected, colour; parts on several lines are joined."""
    spans = page.evaluate(
        """(pane) => [...document.querySelectorAll(`#${pane} .t`)].map((t) => ({
             token: t.token, text: t.textContent, colour: t.style.backgroundColor,
             chosen: t.classList.contains("chosen"), on: t.classList.contains("on")}))""",
        pane,
    )
    joined: dict[int, dict] = {}
    for span in spans:
        joined.setdefault(span["token"], {**span, "text": ""})["text"] += span["text"]
    return list(joined.values())


def test_tokens_are_shown_in_their_colours(show, written):
    r = written[1][0]
    tokens = shown_tokens(show("#tau=-0.25"))
    assert float(r.columns.delta_logp[5]) == -0.25
    assert [t["token"] for t in tokens] == list(range(len(tokens)))
    for t in tokens:
        wanted = r.pieces[t["token"]].replace("\n", "↵").replace("\t", "⇥  ")
        assert t["text"].strip() == wanted.strip()
        delta = float(r.columns.delta_logp[t["token"]])
        assert t["chosen"] == (delta <= -0.25)
        if abs(delta) > 0.2:
            red, _, blue = map(int, re.findall(r"\d+", t["colour"]))
            assert (blue > red) == (delta > 0), (delta, t["colour"])
    assert any(t["chosen"] for t in tokens)


def test_only_what_is_in_view_is_in_the_document(show, written):
    longest = max(range(len(written[1])), key=lambda i: len(written[1][i].pieces))
    r = written[1][longest]
    page = show(f"#response={r.problem}:{r.sample}:{r.source}", height=420)
    assert 100 < len(shown_tokens(page)) < len(r.pieces)
    page.evaluate("() => { const text = document.getElementById('left'); text.scrollTop = text.scrollHeight; }")
    settle(page)
    tokens = shown_tokens(page)
    assert tokens[-1]["token"] == len(r.pieces) - 1
    assert len(tokens) < len(r.pieces)
    assert page.evaluate("() => document.getElementById('left').scrollHeight > 600")


def test_filters_and_the_live_share(show, written):
    page = show()

    def listed() -> int:
        return page.locator("#list button:visible").count()

    def share(passes, criterion=lambda c: c.delta_logp <= np.float32(-0.3)) -> str:
        chosen = np.concatenate([criterion(r.columns) for r in written[1] if passes(r)])
        return f"{chosen.sum():,} of {chosen.size:,} tokens"

    assert listed() == 10
    assert page.inner_text("#of") == share(lambda r: True)
    choose(page, "source", "base")
    assert listed() == 5
    assert page.inner_text("#of") == share(lambda r: r.source == "base")
    choose(page, "correct", "wrong")
    assert listed() == 2
    choose(page, "problem", "1")
    assert listed() == 1
    passes = lambda r: r.source == "base" and r.correct is False and r.problem == 1  # noqa: E731
    assert page.inner_text("#of") == share(passes)
    page.fill("#tau", "0.05")
    page.press("#tau", "Enter")
    settle(page)
    assert page.inner_text("#of") == share(passes, lambda c: c.delta_logp <= np.float32(0.05))
    choose(page, "criterion", "kl")
    page.fill("#tau", "0.1")
    page.press("#tau", "Enter")
    settle(page)
    assert page.inner_text("#of") == share(passes, lambda c: c.kl >= np.float32(0.1))
    page.focus("#slider")
    page.keyboard.press("ArrowRight")
    settle(page)
    tau = float(page.input_value("#tau"))
    assert tau > 0.1
    assert page.inner_text("#of") == share(passes, lambda c: c.kl >= np.float32(tau))
    choose(page, "correct", "not graded")
    assert listed() == 0
    assert page.is_visible("#none")
    choose(page, "problem", "2")
    assert listed() == 1
    assert page.inner_text("#of") == "0 of 0 tokens"


def test_the_keyboard_moves_token_by_token(show, written):
    r = written[1][1]
    page = show(f"#response={r.problem}:{r.sample}:{r.source}", height=500)
    page.focus("#left")

    def at() -> int:
        page.wait_for_timeout(0)
        settle(page)
        identity = page.get_attribute("#left", "aria-activedescendant") or ""
        assert page.locator(f"#{identity}").count() == 1
        assert [t["token"] for t in shown_tokens(page) if t["on"]] == [int(identity.split("-")[1])]
        return int(identity.split("-")[1])

    def press(key: str) -> int:
        page.keyboard.press(key)
        return at()

    assert at() == 0
    assert press("ArrowRight") == 1
    assert press("ArrowRight") == 2
    assert press("ArrowLeft") == 1
    below = press("ArrowDown")
    assert below > 5
    assert press("ArrowUp") < below
    assert press("PageDown") > 60
    last = len(r.pieces) - 1
    assert press("End") == last
    assert press("ArrowRight") == last
    assert press("Home") == 0
    chosen = np.flatnonzero(r.columns.delta_logp <= np.float32(-0.3))
    after = chosen[chosen > 0]
    assert press("n") == after[0]
    assert press("n") == after[1]
    assert press("p") == after[0]
    token = int(after[0])
    numbers = page.inner_text("#inspector")
    delta = float(r.columns.delta_logp[token])
    assert f"−{abs(delta):.2f}" in numbers
    assert f"id {r.columns.token[token]}" in numbers
    assert page.locator("#inspector ol").count() == 2
    for ids, items in ((r.columns.top_base_ids, 0), (r.columns.top_rl_ids, 1)):
        texts = page.locator("#inspector ol").nth(items).locator("b").all_inner_texts()
        spelled = [vocabulary()[int(i)].replace(" ", "·").replace("\n", "↵").replace("\t", "⇥") for i in ids[token]]
        assert [t.strip() for t in texts] == spelled
    page.wait_for_function("() => document.getElementById('spoken').textContent.includes('Delta log p')")


def test_the_pointer_shows_a_token_and_a_click_stays_there(show, written):
    page = show()
    page.hover("#left-7")
    settle(page)
    assert f"8 of {len(written[1][0].pieces)}" in page.inner_text("#inspector")
    page.hover("#heading")
    settle(page)
    assert "1 of" in page.inner_text("#inspector .place")
    page.click("#left-9")
    page.hover("#heading")
    settle(page)
    assert f"10 of {len(written[1][0].pieces)}" in page.inner_text("#inspector")


def test_the_address_keeps_the_state(show):
    page = show()
    choose(page, "source", "rl")
    page.click("#list button:visible >> nth=1")
    page.check("#beside")
    page.click(".segments >> text=Entropy")
    page.fill("#tau", "-0.1")
    page.press("#tau", "Enter")
    page.focus("#left")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => location.hash.includes('token=1')")
    before = page.evaluate("() => location.hash"), page.evaluate("() => ({...window.microscope.state})")
    assert before[1]["colour"] == "entropy_rl"
    assert before[1]["other"] >= 0
    page = show(before[0])
    assert page.evaluate("() => window.microscope.state") == before[1]
    assert page.locator("#panes .pane:visible").count() == 2
    assert page.input_value("#tau") == "-0.1"
    # An address that names nothing opens the page as it is.
    state = show().evaluate("() => window.microscope.state")
    page = show("#response=9:9:x&colour=__proto__&criterion=constructor&tau=NaN&tab=y&problem=77&other=0:0:base")
    assert page.evaluate("() => window.microscope.state") == state


def test_side_by_side_shows_the_same_problem(show, written):
    page = show("#response=1:1:rl")
    page.check("#beside")
    settle(page)
    left, right = (page.locator(f"#{pane}").get_attribute("aria-label") for pane in ("left", "right"))
    assert left == "Tokens: RL, sample 1, not graded"
    assert right == "Tokens: base, sample 1, right"
    base = next(r for r in written[1] if (r.problem, r.sample, r.source) == (1, 1, "base"))
    tokens = shown_tokens(page, "right")
    wanted = np.flatnonzero(base.columns.delta_logp <= np.float32(-0.3))
    assert [t["token"] for t in tokens if t["chosen"]] == [t for t in wanted if t <= tokens[-1]["token"]]
    page.click("#list section:first-child button >> nth=0")
    settle(page)
    assert page.get_attribute("#right", "aria-label") == "Tokens: RL, sample 0, right"


def test_hostile_tokens_stay_text(show):
    page = show("#response=2:0:rl")
    text = "".join(t["text"] for t in shown_tokens(page)).replace(" ", "")
    assert HOSTILE.replace(" ", "") in text
    assert "<b>bold</b>" in text
    assert "\u202e" not in text
    assert "x" * 300 in text
    assert page.evaluate("() => [window.hostile, document.querySelectorAll('#left img, #left b').length]") == [None, 0]
    page.focus("#left")
    for key in ("Home", *["ArrowRight"] * 20, "End"):
        page.keyboard.press(key)
    inside = page.evaluate(
        "() => { const t = document.getElementById('left'); return t.scrollWidth <= t.clientWidth; }"
    )
    assert inside


def test_an_empty_response_and_an_impossible_token(show):
    page = show("#response=2:1:base")
    assert page.inner_text("#inspector").strip() == "base 1: a response without tokens"
    page.focus("#left")
    for key in ("ArrowRight", "End", "n", "PageDown"):
        page.keyboard.press(key)
    assert shown_tokens(page) == []
    page = show("#response=0:1:base&token=4")
    numbers = page.inner_text("#inspector")
    assert "+∞" in numbers
    assert "Only one of base and RL allows it" in numbers


def test_every_colour_carries_readable_text(show):
    """WCAG's contrast of the ink on each colour of each scale is at least 4.5, light and dark."""
    for dark in (False, True):
        page = show(dark=dark)
        colours = page.evaluate(
            """() => Object.keys({delta_logp: 1, entropy_rl: 1, kl: 1, weight: 1}).flatMap((measure) => {
                 const {up, down} = window.microscope.scale(measure, 1); return [...up, ...(down ?? [])]; })"""
        )
        assert len(colours) == 5 * 65
        ink = page.evaluate("() => getComputedStyle(document.body).color")

        def luminance(colour: str) -> float:
            s = np.array([int(x) for x in re.findall(r"\d+", colour)[:3]]) / 255
            return float(np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

        for colour in colours:
            low, high = sorted((luminance(colour), luminance(ink)))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (dark, colour)


def test_figures_have_a_tab_and_screenshots_are_kept(show):
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    for width, height in ((1280, 800), (400, 860)):
        for dark in (False, True):
            page = show("#response=0:1:rl&other=0:1:base&token=40", width=width, height=height, dark=dark)
            page.screenshot(path=str(ARTIFACTS / f"page-{width}-{'dark' if dark else 'light'}.png"))
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    page.click("#tab-figures")
    page.wait_for_function("() => document.querySelector('#figures img')?.naturalWidth > 0")
    assert page.get_attribute("#figures img", "alt") == "Δlog p. Two histograms."


SCROLLING = """async () => {
  const {panes} = microscope, [{text}] = panes, median = (times) => times.sort((a, b) => a - b)[times.length >> 1];
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  const timed = async (times, act) => {
    const all = [];
    for (let i = 0; i < times; i++) {
      await frame();
      const start = performance.now();
      await act(i);
      document.body.getBoundingClientRect();
      all.push(performance.now() - start);
    }
    return median(all);
  };
  const out = {first: microscope.timings.first, all: microscope.timings.all};
  out.scroll = await timed(100, () => { text.scrollTop += 160; panes[0].render(); });
  out.jump = await timed(40, () => { text.scrollTop = Math.random() * text.scrollHeight; panes[0].render(); });
  out.recolour = await timed(20, (i) => microscope.set({colour: i % 2 ? "delta_logp" : "kl"}));
  out.threshold = await timed(20, (i) => microscope.set({tau: -i / 20}));
  out.step = await timed(40, () => panes[0].focus(panes[0].focused + 1));
  out.tokens = document.querySelectorAll(".t").length;
  return out;
}"""


@pytest.mark.slow
def test_a_large_page_stays_smooth(tab, tmp_path):
    """32 responses of 8,192 tokens, two of them side by side; times in milliseconds, printed with `-s`."""
    words = [piece for piece in TEXT.split(" ") if piece]
    pieces = [f" {word}" for word in words] + ["\n\n"]
    responses = []
    for i in range(32):
        own = (pieces[i % 7 :] + pieces * 200)[:8192]
        rng = np.random.default_rng(i)
        responses.append(made_of(i // 4, i % 4 // 2, "base" if i % 2 else "rl", own, rng, correct=bool(i % 3)))
    size = write_page(tmp_path / "large.html", responses, vocabulary=vocabulary())
    tab.goto((tmp_path / "large.html").as_uri() + "#response=0:0:rl&other=0:0:base")
    tab.wait_for_selector("html.complete")
    found = tab.evaluate(SCROLLING)
    print(f"{size / 2**20:.1f} MiB, {size / (32 * 8192):.0f} bytes a token", found)
    assert size < 80 * 32 * 8192
    assert found["tokens"] < 3000
    assert found["first"] < 10_000
    for name in ("scroll", "jump", "recolour", "threshold", "step"):
        assert found[name] < 50, name
