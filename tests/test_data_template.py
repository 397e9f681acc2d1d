"""Chat templates and tokenizer files from strangers: bounded time and memory, and the text of transformers."""

import json
import os
import random
import re
import signal
import time

import pytest

from rlvr_jax.data import template
from rlvr_jax.data.text import encode_text, load_tokenizer, render_chat
from tests.mutations import mutated, refusal
from tests.test_data_text import make_tokenizer, user
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

# What published templates use: loops, slices, namespaces, tools as JSON, macros, the arguments of transformers.
RICH = (
    "{%- macro turn(role, text) %}{{ '<s>' ~ role ~ ':' ~ text | trim ~ '<e>' }}{% endmacro -%}"
    "{%- set ns = namespace(last=-1, seen=[]) -%}"
    "{%- for m in messages[::-1] %}{% if loop.first %}{% set ns.last = messages|length - loop.index0 %}{% endif %}"
    "{% endfor -%}"
    "{% for m in messages %}{{ turn(m['role'], m.content.split('</think>')[-1]) }}\n"
    "{% if m.reasoning_content is defined and m.reasoning_content is string %}[{{ m.reasoning_content }}]{% endif %}"
    "{% if loop.index > 7 %}{% break %}{% endif %}{% endfor %}{{ ns.last }}{{ bos_token }}{{ eos_token }}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}NO{% endif %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)


@pytest.mark.parametrize("text", [RICH, CHAT_TEMPLATE])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"tools": [{"name": "é<f>"}]}])
def test_renders_as_transformers_does(text, options):
    tokenizer = make_tokenizer(template=text, bos_token="<s>")
    messages = [
        *user("  1+1 é\ud800 "),
        {"role": "assistant", "content": "<think>x</think> 2", "reasoning_content": "x", "tool_calls": None},
        *user("and\n{{ 3 }}"),
    ]
    for prompt in (True, False):
        theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **options)
        assert render_chat(tokenizer, messages, add_generation_prompt=prompt, **options) == theirs


def test_named_templates():
    tokenizer = make_tokenizer(template={"default": "D{{ messages[0].content }}", "tool_use": "T"})
    assert render_chat(tokenizer, user("x")) == "Dx"


@pytest.fixture
def short(monkeypatch):
    """Limits that a test can wait for; the process with others is ended before and after."""
    template._renderer(os.getpid())._stop()
    monkeypatch.setattr(template, "SECONDS", 0.5)
    monkeypatch.setattr(template, "MEMORY_MB", 128)
    monkeypatch.setattr(template, "CHARACTERS", 100_000)
    yield
    template._renderer(os.getpid())._stop()


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "macro": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "recursion": "{% for a in [messages] recursive %}{{ loop([a]) }}{% endfor %}",
    "allocates": "{{ 'a' * 10 ** 10 }}",
    "format": "{{ '%9999999999d' % 1 }}",
    "centred": "{{ 'a' | center(9999999999) }}",
    "list": "{{ ([0] * 10 ** 10) | length }}",
    "doubles": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "long": "{% for i in range(99999) %}{{ 'long text' }}{% endfor %}",
}


def test_templates_that_do_not_end(short):
    for name, text in ENDLESS.items():
        began = time.monotonic()
        said = refusal(lambda text=text: render_chat(make_tokenizer(template=text), user("x")))[1] or ""
        assert re.search(r"refuses.*(more than 0\.5 s|MemoryError|RecursionError|OverflowError|characters)", said), name
        assert len(said) < 1000
        assert time.monotonic() - began < 60, name  # most of it on a busy machine: the process starts again
    assert render_chat(make_tokenizer(), user("x")) == "<s>u:x<e>\n<s>a:"


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].system('id') }}",
        "{% set x = namespace(__class__=1) %}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{{ 1 + 'a' }}",
        "{% for %}",
        "{{ none.x.y }}",
        "{{ 1 / 0 }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_templates_that_reach_out_or_fail_are_one_sentence(text):
    _, said = refusal(lambda: render_chat(make_tokenizer(template=text), user("x")))
    assert re.fullmatch(r"the tokenizer: the chat template refuses messages with the roles user: \S.+", said or "")


def test_formats_reach_no_attribute():
    assert render_chat(make_tokenizer(template="{{ '{0.__class__}'.format(1) }}!"), user("x")) == "!"


def test_a_process_that_is_killed_is_started_again():
    tokenizer = make_tokenizer()
    render_chat(tokenizer, user("x"))
    os.kill(template._renderer(os.getpid())._process.pid, signal.SIGKILL)
    assert render_chat(tokenizer, user("x")) == "<s>u:x<e>\n<s>a:"


def test_arguments_are_json():
    with pytest.raises(ValueError, match="must be JSON values"):
        render_chat(make_tokenizer(), user("x"), documents=[object()])


def test_mutated_tokenizer_files_load_or_are_refused_by_name(tmp_path):
    """300 folders with a changed tokenizer.json or tokenizer_config.json, or bytes of one."""
    tiny_tokenizer().save_pretrained(tmp_path)
    names = ("tokenizer.json", "tokenizer_config.json")
    whole = {name: (tmp_path / name).read_bytes() for name in names}
    rng, loaded = random.Random(0), 0
    for trial in range(300):
        name = names[trial % 2]
        content = bytearray(whole[name])
        if trial % 4 < 2:
            content = json.dumps(mutated(mutated(json.loads(content), rng), rng)).encode()
        else:
            content[rng.randrange(len(content))] = rng.randrange(256)
        (tmp_path / name).write_bytes(content)
        tokenizer, said = refusal(lambda: load_tokenizer(tmp_path))
        if tokenizer is not None:
            loaded += 1
            assert all(isinstance(token, int) for token in encode_text(tokenizer, "1+1"))
        assert said is None or (str(tmp_path) in said and len(said) < 1500), trial
        (tmp_path / name).write_bytes(whole[name])
    assert 20 < loaded < 290


DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("tokenizer.json", text) for text in (DEEP, "[]", "", "{", "\x00", '{"model": NaN}')),
        *(("tokenizer_config.json", text) for text in (DEEP, "[]", "", "\x00")),
    ],
)
def test_broken_tokenizer_files(name, text, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"no tokenizer can be loaded|no chat template"):
        render_chat(load_tokenizer(tmp_path), user("1"))


def test_files_larger_than_any_tokenizer(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        with open(tmp_path / name, "r+b") as file:
            size = file.seek(0, 2)
            file.truncate((1 << 28) + 1)  # a hole: no byte is written
            with pytest.raises(ValueError, match=rf"{name}: more than 268,435,456 bytes"):
                load_tokenizer(tmp_path)
            file.truncate(size)
    assert render_chat(load_tokenizer(tmp_path), user("1"))


def test_the_reply_to_an_interrupted_request_is_not_read_as_the_next_one(monkeypatch):
    tokenizer, send = make_tokenizer(template="{{ messages[0].content }}"), template._send

    def interrupted(process, line):
        send(process, line)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(template, "_send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render_chat(tokenizer, user("first"))
    assert render_chat(tokenizer, user("second")) == "second"
