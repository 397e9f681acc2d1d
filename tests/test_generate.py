"""Decoding with one model: against step-by-step references, and the invariances that batches must have."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlvr_jax.decoding import slots, steps
from rlvr_jax.decoding.batch import PREFILL_PIECE, bucket, cache_size
from rlvr_jax.decoding.generate import decode
from rlvr_jax.decoding.sampling import sample
from rlvr_jax.decoding.state import DRAW, LanguageModel, row_keys
from rlvr_jax.generation import generate, language_model
from rlvr_jax.sharding.rules import make_mesh
from tests.decoding_tools import (
    assert_same,
    chi_square,
    compilations,
    full_logprobs,
    softmax,
    tiny_qwen,
    toy_logits,
    toy_model,
    toy_params,
)

TOY = toy_model()
PARAMS = toy_params(0)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1, 2]]


def rows_of(generation, rows):
    return type(generation)(*(field[rows] for field in generation))


def reference_decode(params, prompt, max_new, *, problem, index, seed, stop=(), **sampling):
    """One row, one token at a time over the whole text: the definition of what `decode` returns."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), problem), index)
    temperature = sampling["temperature"]
    tokens, logp = [], []
    for place in range(max_new):
        logits = toy_logits(params, prompt + tokens)
        step_key = jax.random.fold_in(key, 4 * place + DRAW)
        arguments = {name: np.array([value], np.float32) for name, value in sampling.items()}
        token = int(jit_sample(logits[None].astype(np.float32), step_key[None], **arguments)[0])
        tokens.append(token)
        logp.append(np.log(softmax(logits / (temperature or 1.0))[token]))
        if token in stop:
            break
    return tokens, logp


jit_sample = jax.jit(sample)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (0.0, 1.0)])
def test_equals_a_loop_over_the_whole_text(temperature, top_p):
    sampling = {"temperature": temperature, "top_p": top_p}
    stop = (3, 7)
    result = decode(TOY, PARAMS, PROMPTS, max_new_tokens=20, n=2, chunk=8, seed=11, stop_tokens=stop, **sampling)
    assert result.tokens.shape == result.logp.shape == (6, 20)
    assert result.tokens.dtype == result.lengths.dtype == np.int32
    for row in range(6):
        prompt, index = row // 2, row % 2
        tokens, logp = reference_decode(
            PARAMS, PROMPTS[prompt], 20, problem=prompt, index=index, seed=11, stop=stop, **sampling
        )
        length = len(tokens)
        assert result.lengths[row] == length
        assert result.finished[row] == (tokens[-1] in stop)
        np.testing.assert_array_equal(result.tokens[row], tokens + [0] * (20 - length))
        np.testing.assert_allclose(result.logp[row], logp + [0] * (20 - length), atol=1e-4)
    if temperature:
        assert result.finished.any(), "the case must have rows that stop"


def test_rows_do_not_depend_on_companions_padding_or_chunks():
    settings = {"max_new_tokens": 24, "top_p": 0.9, "stop_tokens": (3, 0), "seed": 5}
    together = decode(TOY, PARAMS, PROMPTS, n=3, chunk=8, **settings)
    for index, prompt in enumerate(PROMPTS):
        alone = decode(TOY, PARAMS, [prompt], n=3, problem_ids=[index], chunk=24, **settings)
        assert_same(rows_of(together, slice(3 * index, 3 * index + 3)), alone)
    other_order = decode(
        TOY,
        PARAMS,
        PROMPTS[::-1],
        n=2,
        problem_ids=np.arange(3)[::-1],
        sample_ids=[[2, 0], [2, 1], [0, 1]],
        prompt_length=40,
        chunk=5,
        **settings,
    )
    assert_same(rows_of(together, [8, 6, 5, 4, 0, 1]), other_order)


def test_per_row_settings_are_those_of_the_row():
    temperature, top_p, top_k = np.array([1.0, 0.0, 0.6]), np.array([0.5, 1.0, 1.0]), np.array([0, 0, 4])
    mixed = decode(TOY, PARAMS, PROMPTS, max_new_tokens=9, temperature=temperature, top_p=top_p, top_k=top_k)
    for row, prompt in enumerate(PROMPTS):
        settings = {"temperature": temperature[row], "top_p": top_p[row], "top_k": top_k[row]}
        alone = decode(TOY, PARAMS, [prompt], max_new_tokens=9, problem_ids=[row], **settings)
        assert_same(rows_of(mixed, [row]), alone)


def test_seeds_problems_and_samples_make_different_rows():
    first = decode(TOY, PARAMS, [[1, 2], [1, 2]], max_new_tokens=16, n=2)
    assert len({tuple(row) for row in first.tokens}) == 4
    other = decode(TOY, PARAMS, [[1, 2], [1, 2]], max_new_tokens=16, n=2, seed=1)
    assert (first.tokens != other.tokens).any(axis=1).all()
    # Within a response the noise does not repeat from step to step.
    flat = {**PARAMS, "unembed": np.zeros_like(PARAMS["unembed"])}
    assert len(set(decode(TOY, flat, [[1]], max_new_tokens=40).tokens[0])) > 5


def test_row_keys_are_folded_from_the_seed():
    seed = 3
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 7), 2)
    actual = row_keys(np.array([0, seed], np.uint32), np.array([1, 7], np.uint32), np.array([0, 2], np.uint32))
    np.testing.assert_array_equal(actual[1], jax.random.key_data(expected))


def test_draws_follow_the_models_distribution():
    rows = 4000
    result = decode(TOY, PARAMS, [[1, 2, 3]], max_new_tokens=2, n=rows, chunk=2)
    first = softmax(toy_logits(PARAMS, [1, 2, 3]))
    second = np.stack([softmax(toy_logits(PARAMS, [1, 2, 3, token])) for token in range(11)])
    assert abs(chi_square(result.tokens[:, 0], first)) < 4
    pairs = result.tokens[:, 0] * 11 + result.tokens[:, 1]
    assert abs(chi_square(pairs, (first[:, None] * second).reshape(-1))) < 4


def test_stop_at_the_first_token_and_limit_of_one():
    everything = tuple(range(11))
    stopped = decode(TOY, PARAMS, PROMPTS, max_new_tokens=50, stop_tokens=everything)
    np.testing.assert_array_equal(stopped.lengths, [1, 1, 1])
    assert stopped.finished.all()
    one = decode(TOY, PARAMS, PROMPTS, max_new_tokens=1)
    assert not one.finished.any()
    np.testing.assert_array_equal(one.tokens[:, 0], stopped.tokens[:, 0])


def counted(model: LanguageModel, shapes: list) -> LanguageModel:
    def forward(params, tokens_BT, positions_BT, cache):
        shapes.append(tokens_BT.shape)
        return model.forward(params, tokens_BT, positions_BT, cache)

    return model._replace(forward=forward)


def test_prompt_is_prefilled_once_for_its_samples():
    shapes = []
    decode(counted(TOY, shapes), PARAMS, PROMPTS, max_new_tokens=4, n=5)
    assert {shape for shape in shapes if shape[1] > 1} == {(4, 16)}, "three prompts, in a program for four"
    assert {shape for shape in shapes if shape[1] == 1} == {(15, 1)}


def test_prefilled_prompts_are_dropped_when_their_rows_are_in_slots():
    """Else a long run would keep the caches of all its prompts."""
    length, seen = 23, []  # a length that no other test uses, to find the arrays by

    def look(*_: int) -> None:
        seen.append(sum(x.shape == (1, length) for x in jax.live_arrays()))

    decode(TOY, PARAMS, [[1, 2]] * 5, max_new_tokens=2, slots=1, prompt_length=length, on_chunk=look)
    assert len(seen) == 5
    assert max(seen) <= 1


def test_long_prompts_are_prefilled_in_pieces():
    prompt = np.random.default_rng(0).integers(0, 11, 2 * PREFILL_PIECE + 9)
    shapes = []
    result = decode(counted(TOY, shapes), PARAMS, [prompt, prompt[-3:]], max_new_tokens=5, temperature=0)
    assert (2, PREFILL_PIECE) in shapes
    for row, text in enumerate([list(prompt), list(prompt[-3:])]):
        tokens, _ = reference_decode(PARAMS, text, 5, problem=row, index=0, seed=0, temperature=0.0)
        np.testing.assert_array_equal(result.tokens[row], tokens)


def test_buckets_and_capacities():
    assert [bucket(length) for length in (0, 16, 17, 25, 33, 64, 65, 97, 129)] == [16, 16, 24, 32, 48, 64, 96, 128, 192]
    assert [cache_size(needed, 160) for needed in (1, 33, 64, 65, 129)] == [1, 64, 64, 128, 160]


def test_the_cache_grows_with_the_text():
    """Growing is invisible in the result, and happens by powers of two up to what the request can need."""
    sizes = []

    def grow(cache, length):
        sizes.append(length)
        return TOY.grow_cache(cache, length)

    grown = decode(TOY._replace(grow_cache=grow), PARAMS, PROMPTS, max_new_tokens=50, chunk=8)
    assert sizes == [32, 64]
    assert_same(grown, decode(TOY, PARAMS, PROMPTS, max_new_tokens=50, chunk=50))


def test_nothing_is_compiled_again():
    call = {"max_new_tokens": 12, "n": 2, "chunk": 4}
    with compilations() as compiled:
        decode(TOY, PARAMS, PROMPTS, **call)
    assert compiled
    others = [
        {"temperature": 0.5, "top_p": 0.7, "top_k": 3, "seed": 2**40},
        {"temperature": 0.0, "stop_tokens": (1, 2, 3)},
        {"temperature": np.linspace(0, 1, 6), "problem_ids": [9, 8, 7], "sample_ids": [5, 6]},
        {"top_p": np.linspace(0, 1, 6), "stop_tokens": range(4)},
    ]
    with compilations() as compiled:
        for settings in others:
            decode(TOY, toy_params(1), [[1], [2, 3], [4, 5, 6, 7]], **call, **settings)
    assert not compiled
    config, params = tiny_qwen()
    generate(config, params, PROMPTS, max_new_tokens=12)
    _, others = tiny_qwen(seed=1)
    with compilations() as compiled:
        generate(dataclasses.replace(config), others, PROMPTS, max_new_tokens=12, temperature=0.3, seed=8)
    assert not compiled


def test_the_chunk_updates_the_cache_in_place():
    config, params = tiny_qwen()
    model = language_model(dataclasses.replace(config, dtype="float32"))
    state = slots.empty_slots((model,), 12, 256)
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(state.caches))
    stop_S, leave_at = np.full(4, -1, np.int32), np.int32(13)
    compiled = steps.advance.lower((model,), None, 8, 1, (model.prepare(params),), stop_S, leave_at, state).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes, "a copy of the cache would be among the temporaries"


def test_progress_is_reported_once_a_chunk():
    seen = []
    result = decode(TOY, PARAMS, PROMPTS, max_new_tokens=10, chunk=4, on_chunk=lambda *x: seen.append(x))
    assert seen == [(0, 12), (0, 24), (3, 30)]
    assert result.lengths.sum() == 30


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_qwen_greedy_is_the_argmax_of_the_full_forward(model_type):
    config, params = tiny_qwen(model_type, tie_word_embeddings=model_type == "qwen2")
    result = generate(config, params, PROMPTS, max_new_tokens=12, temperature=0)
    texts = [prompt + result.tokens[row].tolist() for row, prompt in enumerate(PROMPTS)]
    logp_BTV = full_logprobs(config, params, texts)
    for row, prompt in enumerate(PROMPTS):
        # If every token is the argmax given the tokens before it, the whole text is the greedy one.
        logp_TV = logp_BTV[row, len(prompt) - 1 : len(prompt) + 11]
        np.testing.assert_array_equal(result.tokens[row], logp_TV.argmax(axis=1))
        np.testing.assert_allclose(result.logp[row], logp_TV.max(axis=1), atol=1e-5)


def test_qwen_logp_is_that_of_the_trainer():
    """Log-probs at temperature 0.7 from one full forward over the drawn text, with and without the prepared form."""
    config, params = tiny_qwen()
    settings = {"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.9}
    result = generate(config, params, PROMPTS, **settings)
    texts = [prompt + result.tokens[row].tolist() for row, prompt in enumerate(PROMPTS)]
    logp_BTV = full_logprobs(config, params, texts, temperature=0.7)
    for row, prompt in enumerate(PROMPTS):
        expected = logp_BTV[row, np.arange(len(prompt) - 1, len(prompt) + 11), result.tokens[row]]
        np.testing.assert_allclose(result.logp[row], expected, atol=2e-5)
    prepared = language_model(dataclasses.replace(config, dtype="float32")).prepare(params)
    assert_same(result, generate(config, prepared, PROMPTS, **settings), 0)


def test_preparing_casts_matrices_and_keeps_norms():
    config, params = tiny_qwen()
    model = language_model(dataclasses.replace(config, dtype="bfloat16"))
    prepared = model.prepare(params)
    assert len(prepared["layers"]) == 2
    assert prepared["embed"].dtype == prepared["layers"][1]["q_proj"].dtype == jnp.bfloat16
    assert prepared["final_norm"].dtype == prepared["layers"][0]["attn_norm"].dtype == jnp.float32
    assert model.prepare(prepared) is prepared
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(model.init_cache(1, 4)))


@pytest.mark.parametrize(
    "shape", [{"data": 2, "fsdp": 2, "tensor": 2}, pytest.param({"fsdp": 8}, marks=pytest.mark.slow)]
)
def test_a_mesh_gives_the_same_tokens(shape):
    config, params = tiny_qwen()
    prompts = [[1 + i, 2, 3][: 1 + i % 3] for i in range(8)]
    call = {"max_new_tokens": 12, "n": 2, "top_p": 0.9, "stop_tokens": (3, 9)}
    expected = generate(config, params, prompts, **call)
    mesh = make_mesh(**shape)
    assert_same(expected, generate(config, params, prompts, **call, mesh=mesh), atol=1e-4)
    with compilations() as compiled:
        generate(config, params, prompts, **call, seed=3, mesh=mesh)
    assert not compiled


def test_what_the_host_reads_is_on_every_process():
    """The host asks for it as a whole, which an array split over the processes of a cluster refuses."""
    config, params = tiny_qwen()
    model = language_model(config)
    with jax.set_mesh(make_mesh(data=8)):
        tokens_PL, length_P = np.ones((8, 16), np.int32), np.full(8, 9, np.int32)
        caches, valid_P = slots.prefill_prompts((model,), (params,), tokens_PL, length_P)
        assert not caches[0].k[0].is_fully_replicated
        assert valid_P.is_fully_replicated
        state = slots.empty_slots((model,), 8, 16)
        state, report = steps.advance((model,), None, 2, 1, (params,), np.full(4, -1), np.int32(1), state)
    assert not state.last_B.is_fully_replicated
    assert all(x.is_fully_replicated for x in report.values())


BAD = {
    "n": ({"n": 0}, "n=0"),
    "max_new_tokens": ({"max_new_tokens": 0}, "max_new_tokens=0"),
    "no prompts": ({"prompts": []}, "prompts is empty"),
    "empty prompt": ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
    "token outside": ({"prompts": [[1, 64]]}, r"prompts\[0\] has token 64"),
    "negative token": ({"prompts": [[-1]]}, r"prompts\[0\]"),
    "temperature": ({"temperature": -0.1}, "temperature=-0.1"),
    "temperature near 0": ({"temperature": 1e-38}, "temperature=1e-38"),  # logits divided by it would be infinite
    "temperature nan": ({"temperature": float("nan")}, "temperature=nan"),
    "temperature rows": ({"temperature": np.ones(2)}, "temperature has shape"),
    "top_p below": ({"top_p": -0.1}, "top_p=-0.1"),
    "temperature numpy": ({"temperature": np.float32(-1)}, "temperature="),
    "top_k too large": ({"top_k": 2**31}, "top_k=2147483648"),
    "prompts nested": ({"prompts": [np.ones((1, 2), int)]}, r"prompts\[0\]=array"),
    "prompts fractions": ({"prompts": [np.array([1.5])]}, r"prompts\[0\]=array\(\[1.5\]\)"),
    "prompts too large": ({"prompts": [[2**40]]}, r"prompts\[0\]=\[1099511627776\]"),
    "seed too large": ({"seed": 2**64}, "seed=18446744073709551616"),
    "stop one": ({"stop_tokens": np.array(3)}, "stop_tokens=array"),
    "stop fractions": ({"stop_tokens": np.array([1.5])}, "stop_tokens=array"),
    "top_p above": ({"top_p": 1.1}, "top_p=1.1"),
    "top_k": ({"top_k": -1}, "top_k=-1"),
    "top_k fraction": ({"top_k": 1.5}, "top_k=1.5"),
    "seed": ({"seed": -1}, "seed=-1"),
    "stop": ({"stop_tokens": (64,)}, "stop_tokens has token 64"),
    "stop negative": ({"stop_tokens": (1, -1)}, "stop_tokens"),
    "length": ({"max_new_tokens": 511}, "max_position_embeddings 512"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_compiled(case):
    arguments, message = BAD[case]
    config, params = tiny_qwen()
    arguments = {"prompts": [[1, 2]], "max_new_tokens": 4, **arguments}
    with compilations() as compiled, pytest.raises(ValueError, match=message) as raised:
        generate(config, params, **arguments)
    assert not compiled
    assert "expected" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bad_ids_and_lengths_of_decode():
    for arguments, message in (
        ({"problem_ids": [1, 2]}, "problem_ids"),
        ({"sample_ids": [-1]}, "sample_ids"),
        ({"chunk": 0}, "chunk=0"),
        ({"prompt_length": 2}, "prompt_length=2: the longest prompt has 3"),
    ):
        with pytest.raises(ValueError, match=message):
            decode(TOY, PARAMS, [[1, 2, 3]], max_new_tokens=2, **arguments)


def test_a_prompt_may_be_as_long_as_the_padding():
    fits = decode(TOY, PARAMS, [[1, 2, 3]], max_new_tokens=2, prompt_length=3)
    assert_same(fits, decode(TOY, PARAMS, [[1, 2, 3]], max_new_tokens=2))


def test_parameters_of_another_vocabulary():
    config, params = tiny_qwen()
    with pytest.raises(ValueError, match=r"shape \(64, 32\): expected \(65, 32\)"):
        generate(dataclasses.replace(config, vocab_size=65), params, [[1]], max_new_tokens=1)


def test_on_cpu_bfloat16_parameters_decode_in_float32():
    """The tokens and log-probs of the same numbers stored as float32."""
    config, params = tiny_qwen()
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    assert config.dtype is None
    assert_same(
        generate(config, stored, PROMPTS, max_new_tokens=8), generate(config, widened, PROMPTS, max_new_tokens=8)
    )
    narrow = generate(dataclasses.replace(config, dtype="bfloat16"), stored, PROMPTS, max_new_tokens=8)
    assert narrow.logp.dtype == np.float32
