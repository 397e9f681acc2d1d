"""Tokenizers, chat prompts and conversations: a tiny tokenizer made here, and the real Qwen ones where they are."""

import json
import os
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlvr_jax.data.sft import encode_conversation, read_conversations, write_conversations
from rlvr_jax.data.text import encode_chat, encode_text, load_tokenizer, render_chat, stop_token_ids

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "<s>{{ m.role[0] }}:{{ m.content }}<e>\n{% endfor %}{% if add_generation_prompt %}<s>a:{% endif %}"
)
REAL = Path(os.environ.get("RLVR_TOKENIZERS", Path(__file__).parents[2] / "shared" / "tokenizers"))


def make_tokenizer(template=TEMPLATE, **special):
    characters = ["<s>", "<e>", "<pad>", "?", *"abcdefghijklmnopqrstuvwxyz0123456789+-*=: \n\\{}."]
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(characters)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"eos_token": "<e>", "pad_token": "<pad>", "additional_special_tokens": ["<s>"], **special}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return load_tokenizer(folder)


def user(text):
    return [{"role": "user", "content": text}]


def test_tiny_chat_by_hand(tiny):
    expected = "<s>u:1+1<e>\n<s>a:"
    assert render_chat(tiny, user("1+1")) == expected
    ids = encode_chat(tiny, user("1+1"))
    names = tiny.convert_ids_to_tokens(ids)
    assert names == ["<s>", "u", ":", "1", "+", "1", "<e>", "\n", "<s>", "a", ":"]
    assert tiny.decode(ids) == expected
    assert encode_chat(tiny, user("1+1"), add_generation_prompt=False) == ids[:-3]
    assert all(type(token) is int for token in ids)


def test_saved_and_loaded_again_gives_the_same_ids(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert encode_chat(again, user("a\\b {2}")) == encode_chat(tiny, user("a\\b {2}"))
    assert again.get_vocab() == tiny.get_vocab()
    assert (again.eos_token, again.pad_token) == ("<e>", "<pad>")


def test_the_class_named_in_the_folder_is_not_used(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "Qwen2Tokenizer"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    loaded = load_tokenizer(tmp_path)
    assert encode_chat(loaded, user("1+1")) == encode_chat(tiny, user("1+1"))
    assert loaded.decode(encode_text(loaded, "a  b\n c")) == "a  b\n c"


def test_template_inside_the_config_file_is_read(tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    assert render_chat(load_tokenizer(tmp_path), user("x")) == "<s>u:x<e>\n<s>a:"


def test_bad_tokenizers_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no tokenizer\.json in this folder"):
        load_tokenizer(tmp_path)


def test_bad_messages_are_named(tiny):
    with pytest.raises(ValueError, match=r"messages\[1\]\['content'\] = None"):
        encode_chat(tiny, [*user("x"), {"role": "user"}])
    with pytest.raises(ValueError, match="at least one"):
        encode_chat(tiny, [])
    with pytest.raises(ValueError, match="refuses messages with the roles user, critic: no critics"):
        encode_chat(tiny, [*user("x"), {"role": "critic", "content": "x"}])
    with pytest.raises(ValueError, match="no chat template"):
        encode_chat(make_tokenizer(template=None), user("x"))


def test_odd_text_is_encoded(tiny):
    for text in ("\ud800", "a\udfffb", "\0", "", "é" * 1000, "\U0001f600"):
        ids = encode_text(tiny, text)
        assert len(ids) <= len(text)
    assert encode_text(tiny, "a\ud800b") == encode_text(tiny, "a?b")


def test_stop_tokens(tiny, tmp_path, caplog):
    end, start = tiny.convert_tokens_to_ids(["<e>", "<s>"])
    assert stop_token_ids(tiny, None) == (end,)
    assert stop_token_ids(tiny, tmp_path) == (end,)  # a folder without generation_config.json
    path = tmp_path / "generation_config.json"
    for value, expected in [(start, (end, start)), ([start, end, 9], (end, start, 9)), (None, (end,)), (0, (end, 0))]:
        path.write_text(json.dumps({"eos_token_id": value}))
        assert stop_token_ids(tiny, tmp_path) == stop_token_ids(tiny, path) == tuple(dict.fromkeys(expected))
    for value in ("<e>", [1.5], -1, True, 2**31, {"a": 1}, [[1]]):
        path.write_text(json.dumps({"eos_token_id": value}))
        with pytest.raises(ValueError, match="eos_token_id"):
            stop_token_ids(tiny, path)
    for text, named in (("[]", "holds a list"), ("{", "not JSON"), ('{"eos_token_id": NaN}', "NaN is no number")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"generation_config\.json: (not JSON: )?{named}"):
            stop_token_ids(tiny, path)
    with pytest.raises(ValueError, match="no such file"):
        stop_token_ids(tiny, tmp_path / "absent.json")
    assert stop_token_ids(make_tokenizer(eos_token=None), None) == ()
    assert "no stop token is named" in caplog.text


def test_stop_tokens_of_config_json(tiny, tmp_path):
    """Where generation_config.json is missing or names none, transformers and vLLM take those of config.json."""
    end, start = tiny.convert_tokens_to_ids(["<e>", "<s>"])
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [start, 9]}))
    assert stop_token_ids(tiny, tmp_path) == (end, start, 9)
    for settings, expected in [
        ({}, (end, start, 9)),
        ({"eos_token_id": None}, (end, start, 9)),
        ({"eos_token_id": 7}, (end, 7)),
    ]:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        assert stop_token_ids(tiny, tmp_path) == expected
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id = '</s>'"):
        stop_token_ids(tiny, tmp_path)


def test_token_zero_may_end_a_response(tmp_path):
    tokenizer = make_tokenizer(eos_token="<s>")
    assert tokenizer.eos_token_id == 0
    assert stop_token_ids(tokenizer, None) == (0,)


def test_conversation_mask_by_hand(tiny):
    messages = [*user("1+1"), {"role": "assistant", "content": "2."}]
    tokens, mask = encode_conversation(tiny, messages)
    assert tiny.convert_ids_to_tokens(tokens) == ["<s>", *"u:1+1", "<e>", "\n", "<s>", *"a:2.", "<e>"]
    assert mask == [0] * 11 + [1] * 3
    assert tokens[:11] == encode_chat(tiny, messages[:-1])
    for limit in (1, 11, 12, 14, 99):
        assert encode_conversation(tiny, messages, limit) == (tokens[:limit], mask[:limit])
    longer = [*messages, *user("and"), {"role": "assistant", "content": ""}]
    tokens, mask = encode_conversation(tiny, longer)
    assert sum(mask) == 1  # the end-of-turn token of the last turn alone
    assert tokens[-1] == tiny.eos_token_id


def test_the_end_of_a_turn_that_only_the_vocabulary_calls_special(tiny, tmp_path):
    """As in a base model's folder, whose settings name another end-of-text token."""
    messages = [*user("1+1"), {"role": "assistant", "content": "2."}]
    tiny.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>", "pad_token": "<s>"}')
    other = load_tokenizer(tmp_path)
    assert tiny.eos_token_id not in other.all_special_ids
    assert encode_conversation(other, messages) == encode_conversation(tiny, messages)


def test_a_byte_order_mark_before_a_template_is_no_text(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("\ufeff" + tiny.chat_template, encoding="utf-8")
    assert encode_chat(load_tokenizer(tmp_path), user("1+1")) == encode_chat(tiny, user("1+1"))


def test_conversations_that_cannot_be_learnt_are_refused(tiny):
    with pytest.raises(ValueError, match="the roles user"):
        encode_conversation(tiny, user("x"))
    with pytest.raises(ValueError, match="the roles assistant"):
        encode_conversation(tiny, [{"role": "assistant", "content": "x"}])
    chat = [*user("x"), {"role": "assistant", "content": "y"}]
    with pytest.raises(ValueError, match="max_tokens = 0"):
        encode_conversation(tiny, chat, 0)
    rewriting = make_tokenizer(template="{{ messages | length }}{{ messages[-1].content }}<e>")
    with pytest.raises(ValueError, match="after its generation prompt"):
        encode_conversation(rewriting, chat)
    endless = make_tokenizer(template="{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="no special token"):
        encode_conversation(endless, chat)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_conversations_round_trip(tmp_path, ending):
    rows = [
        [*user("1+1 é\n"), {"role": "assistant", "content": "2"}],
        [{"role": "system", "content": "s"}, *user("x"), {"role": "assistant", "content": ""}],
    ]
    path = tmp_path / "new" / f"rows.{ending}"
    write_conversations(path, rows)
    assert read_conversations(path) == [tuple(row) for row in rows]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_conversations_as_prompt_and_response(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "response": "b"}, {"prompt": user("c"), "response": "d"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    answer = [{"role": "assistant", "content": "b"}, {"role": "assistant", "content": "d"}]
    assert read_conversations(path) == [(*user("a"), answer[0]), (*user("c"), answer[1])]
    for row, part in [
        ({"prompt": "a"}, "'response' = None"),
        ({"response": "a"}, "no 'messages'"),
        ({"messages": user("x")}, "the roles user"),
        ({"messages": []}, "at least one"),
        ({"messages": "text"}, "'messages' = 'text'"),
        ({"prompt": [1], "response": "a"}, r"'prompt'\[0\] = 1"),
        ({"prompt": [*user("x"), answer[0]], "response": "a"}, "'prompt' ends with the assistant's turn"),
    ]:
        path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(row))
        with pytest.raises(ValueError, match=f"rows.jsonl row 1: .*{part}"):
            read_conversations(path)


# The real vocabularies

REAL_CHATS = {
    "qwen2.5": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "qwen3": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
}
TEXTS = (
    "What is $\\frac{1}{2}+12345$?\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "½ é 日本語 \U0001f600  two  spaces\t\n\n\nend ",
    "don't I'LL 3.14159 !!! x\u200by",
)


@pytest.fixture(scope="module", params=sorted(REAL_CHATS))
def real(request):
    folder = REAL / request.param
    if not folder.is_dir():
        pytest.skip(f"no real Qwen tokenizer at {folder}; set RLVR_TOKENIZERS to a folder with {request.param}/")
    return request.param, load_tokenizer(folder)


def test_real_template_and_round_trip(real, tmp_path):
    name, tokenizer = real
    for text in TEXTS:
        expected = REAL_CHATS[name].format(text)
        assert render_chat(tokenizer, user(text)) == expected
        ids = encode_chat(tokenizer, user(text))
        assert tokenizer.decode(ids) == expected
        assert ids.count(151644) == ids.count(151645) + 1  # <|im_start|>, <|im_end|>
    assert encode_text(tokenizer, "Hello world") == [9707, 1879]
    assert encode_text(tokenizer, "42") == [19, 17]  # digits one by one

    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert encode_chat(again, user(text)) == encode_chat(tokenizer, user(text))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert stop_token_ids(again, None) == stop_token_ids(tokenizer, None) == (151645,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 151643}')  # as base models have it
    assert stop_token_ids(again, tmp_path) == (151645, 151643)


def test_real_conversation_mask(real):
    name, tokenizer = real
    for content in ("It is \\boxed{2}.", "<think>\nhm\n</think>\n\nIt is 2."):
        messages = [*user("1+1?"), {"role": "assistant", "content": content}]
        tokens, mask = encode_conversation(tokenizer, messages)
        learnt = tokenizer.decode([token for token, counts in zip(tokens, mask, strict=True) if counts])
        think = "" if name == "qwen2.5" or "<think>" in content else "<think>\n\n</think>\n\n"
        assert learnt == f"{think}{content}<|im_end|>"
        assert mask == sorted(mask)
        assert tokens[: mask.index(1)] == encode_chat(tokenizer, messages[:-1])


def test_qwen3_template_arguments(real):
    name, tokenizer = real
    if name != "qwen3":
        pytest.skip("enable_thinking is an argument of Qwen3's template")
    assert render_chat(tokenizer, user("x"), enable_thinking=False).endswith("<think>\n\n</think>\n\n")
