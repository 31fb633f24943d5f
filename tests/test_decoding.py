"""Generation: cached decoding equals the full pass, and a reply depends on its own prompt and seed alone."""

import itertools
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import mesh_cases
import numpy as np
import pytest
from flax import nnx

from jaxtax.decoding import (
    Decoding,
    Generated,
    advance,
    choose_tokens,
    generate,
    generate_batch,
    pad_left,
    padded_length,
    start,
    stream,
)
from jaxtax.model.config import Moe, gpt_oss, qwen2
from jaxtax.model.transformer import Transformer
from jaxtax.sharding import filled_rows, make_mesh, shardings

GPT_OSS = gpt_oss(
    vocab_size=53, embed_dim=32, mlp_dim=20, head_dim=6, num_layers=2, num_heads=4, num_kv_heads=2,
    windows=(5, None), moe=Moe(num_experts=7, experts_per_token=3), max_context=128,
)  # fmt: skip
QWEN2 = qwen2(
    vocab_size=53, embed_dim=24, mlp_dim=40, head_dim=8, num_layers=2, num_heads=6, num_kv_heads=2,
    max_context=128, tied_embedding=True,
)  # fmt: skip
CONFIGS = {"gpt_oss": GPT_OSS, "qwen2": QWEN2}
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "stop_ids": (3, 11), "batch": 5}
LENGTHS = (1, 3, 11, 40, 17)  # below and above the window of 5, and of two padded lengths


def make_model(cfg, seed=0) -> Transformer:
    """Weights drawn by numpy (nothing to compile), so large that the likeliest token keeps changing."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.7, leaf.shape), leaf.dtype), shapes)


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> Transformer:
    return make_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def small() -> Transformer:
    return make_model(GPT_OSS)


def make_prompts(lengths=LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 53, length).tolist() for length in lengths]


def reply_of(model, prompts, **settings) -> list[Generated]:
    defaults = {"stop_ids": (), "vocab_limit": 53, "max_new_tokens": 12}
    return generate(model, prompts, **(defaults | settings))


@jax.jit
def full_logits(model: Transformer, tokens: jax.Array) -> jax.Array:
    shape = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    return model.logits(model(tokens, positions, jnp.ones(shape, jnp.int32)))


def test_greedy_decoding_is_the_argmax_of_the_full_pass_at_every_token(model):
    prompts = make_prompts()
    replies = reply_of(model, prompts)
    rows = [prompt + reply.tokens for prompt, reply in zip(prompts, replies, strict=True)]
    # What stands to the right changes nothing to the left of it, so the rows can be filled up to one length.
    scores = np.asarray(full_logits(model, jnp.asarray([row + [0] * (52 - len(row)) for row in rows])))
    for prompt, reply, row in zip(prompts, replies, scores, strict=True):
        assert len(reply.tokens) == 12
        assert row[len(prompt) - 1 : len(prompt) + 11].argmax(axis=-1).tolist() == reply.tokens
    different = {token for reply in replies for token in reply.tokens}
    assert len(different) > 9, "replies that never change would pass anything"


def test_a_row_alone_gives_the_reply_it_gives_in_a_batch(small):
    prompts = make_prompts()
    seeds = [5, 2**32 - 1, 77, 0, 9]
    together = reply_of(small, prompts, seeds=seeds, **SAMPLED)
    alone = [
        reply_of(small, [p], seeds=[s], prompt_length=40, **SAMPLED)[0]
        for p, s in zip(prompts, seeds, strict=True)
    ]
    assert together == alone
    backwards = reply_of(small, prompts[::-1], seeds=seeds[::-1], **SAMPLED)
    assert backwards[::-1] == together


def test_a_batch_size_only_cuts_the_list_into_pieces(small):
    prompts, seeds = make_prompts(), [1, 2, 3, 4, 5]
    whole = reply_of(small, prompts, seeds=seeds, temperature=1.0)
    assert reply_of(small, prompts, seeds=seeds, temperature=1.0, batch=2, prompt_length=40) == whole
    assert reply_of(small, []) == []


def test_seeds_decide_the_sample(small):
    replies = reply_of(small, [make_prompts()[3]] * 5, seeds=[1, 1, 2, 3, 3], temperature=1.0)
    assert replies[3] == replies[4]
    assert replies[0] == replies[1]
    assert len({tuple(r.tokens) for r in replies}) == 3


def test_temperature_samples_the_softmax():
    logits = jnp.log(jnp.asarray([0.5, 0.25, 0.15, 0.1, 1e-9]))
    draws = 20_000
    keys = jax.vmap(jax.random.key)(jnp.arange(draws, dtype=jnp.uint32))
    for temperature in (1.0, 0.5, 2.0):
        decoding = Decoding(1, (), 5, temperature=temperature)
        tokens = np.asarray(choose_tokens(jnp.tile(logits, (draws, 1)), keys, 3, decoding))
        expected = np.asarray(jax.nn.softmax(logits / temperature))[:4] * draws
        found = np.bincount(tokens, minlength=5)[:4]
        chi_square = ((found - expected) ** 2 / expected).sum()
        assert chi_square < 16.3, (temperature, found, expected)  # 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize(("top_p", "nucleus"), [(0.5, {2}), (0.55, {2, 0}), (0.8, {2, 0, 4}), (0.2, {2})])
def test_top_p_draws_the_whole_nucleus_and_nothing_outside_it(top_p, nucleus):
    logits = jnp.log(jnp.asarray([0.2, 0.05, 0.5, 0.1, 0.15]))
    draws = 4000
    keys = jax.vmap(jax.random.key)(jnp.arange(draws, dtype=jnp.uint32))
    decoding = Decoding(1, (), 5, temperature=1.0, top_p=top_p)
    tokens = np.asarray(choose_tokens(jnp.tile(logits, (draws, 1)), keys, 0, decoding))
    assert set(tokens.tolist()) == nucleus
    if len(nucleus) == 2:
        assert abs((tokens == 2).mean() - 5 / 7) < 0.03


def test_top_p_breaks_ties_by_the_lower_id():
    decoding = Decoding(1, (), 4, temperature=1.0, top_p=0.5)
    keys = jax.vmap(jax.random.key)(jnp.arange(200, dtype=jnp.uint32))
    tokens = np.asarray(choose_tokens(jnp.zeros((200, 4)), keys, 0, decoding))
    assert set(tokens.tolist()) == {0, 1}


def test_replies_end_at_their_stop_token_and_stay_ended(small):
    prompts = make_prompts()
    free = reply_of(small, prompts, max_new_tokens=12)
    stop = free[2].tokens[4]  # some token that occurs
    stopped = reply_of(small, prompts, max_new_tokens=12, stop_ids=(stop,))
    ends = set()
    for before, after in zip(free, stopped, strict=True):
        end = before.tokens.index(stop) + 1 if stop in before.tokens else 12
        assert after == Generated(before.tokens[:end], finished=stop in before.tokens)
        ends.add(end)
    assert len(ends) > 1, "rows must end at different times for this test to say anything"


def test_nothing_is_written_after_the_end_and_empty_rows_are_done(small):
    prompts = make_prompts()
    stop = reply_of(small, prompts)[2].tokens[1]
    tokens, segments = pad_left(prompts[:3], 5)
    decoding = Decoding(12, (stop,), 53)
    out, count, finished = generate_batch(small, tokens, segments, np.zeros(5, np.uint32), decoding=decoding)
    beyond = np.arange(12) >= np.asarray(count)[:, None]
    assert (np.asarray(out)[beyond] == 0).all()
    assert np.asarray(count)[3:].tolist() == [0, 0]
    assert np.asarray(finished)[3:].all()
    assert 0 < count[2] <= 2


def test_a_cut_off_reply_is_marked_unfinished(small):
    reply = reply_of(small, make_prompts())[3]
    assert reply.finished is False
    last = reply.tokens[-1]
    assert last not in reply.tokens[:-1], "choose another prompt: the last token has to be a new one"
    assert reply_of(small, make_prompts(), stop_ids=(last,))[3] == Generated(reply.tokens, finished=True)


def test_what_is_streamed_is_what_is_generated_and_only_grows(small):
    prompts, seeds = make_prompts(), [5, 2**32 - 1, 77, 0, 9]
    whole = reply_of(small, prompts, seeds=seeds, **SAMPLED)
    compiled = start._cache_size(), advance._cache_size()
    seen = list(stream(small, prompts, seeds=seeds, vocab_limit=53, max_new_tokens=12, **SAMPLED))
    assert (start._cache_size(), advance._cache_size()) == compiled, "another program may give other tokens"
    assert seen[-1] == whole
    assert len({one.finished for one in whole}) == 2, "some rows must end before others"
    assert len(seen) > 3
    assert {len(one.tokens) for one in seen[0]} == {1}
    for before, after in itertools.pairwise(seen):
        assert all(b.tokens[: len(a.tokens)] == a.tokens for a, b in zip(before, after, strict=True))
        assert sum(len(one.tokens) for one in after) > sum(len(one.tokens) for one in before)


def test_a_stream_is_computed_only_as_far_as_it_is_read(small):
    seen = stream(small, make_prompts(), stop_ids=(), vocab_limit=53, max_new_tokens=12)
    assert [len(next(seen)[0].tokens), len(next(seen)[0].tokens)] == [1, 2]
    seen.close()
    assert list(stream(small, [], stop_ids=(), vocab_limit=53, max_new_tokens=12)) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_beyond_the_vocabulary_limit_are_never_chosen_even_with_the_highest_scores(small, temperature):
    prompts, settings = make_prompts(), {"seeds": [1] * 5, "temperature": temperature}
    limited = reply_of(small, prompts, vocab_limit=9, **settings)
    assert max(max(r.tokens) for r in limited) < 9
    padded = jax.tree.map(lambda leaf: leaf, small)
    unembed = small.unembed[...]
    # Rows from 9 on belong to no token here, and one of them scores far above any other row.
    padded.unembed = small.unembed.replace(
        unembed.at[9:18].set(50 * unembed[:9]).at[18:27].set(-50 * unembed[:9])
    )
    free = reply_of(padded, prompts, **settings)
    assert min(max(r.tokens) for r in free) >= 9
    assert reply_of(padded, prompts, vocab_limit=9, **settings) == limited


def test_models_of_one_config_share_the_compiled_program(small):
    other = make_model(GPT_OSS, seed=1)
    first = reply_of(small, make_prompts())
    compiled = start._cache_size(), advance._cache_size()
    assert reply_of(other, make_prompts()) != first
    assert reply_of(small, make_prompts((39, 2, 35, 18, 20))) != first
    assert (start._cache_size(), advance._cache_size()) == compiled


def test_bfloat16_compute_decodes(small):
    replies = reply_of(small, make_prompts(), dtype="bfloat16")
    assert all(len(r.tokens) == 12 for r in replies)


def test_prompts_are_padded_as_if_the_longest_possible_one_were_among_them():
    tokens, segments = pad_left([[7, 8]], 3, 40)
    assert tokens.shape == segments.shape == (3, 64)
    assert tokens[0, -3:].tolist() == [0, 7, 8]
    assert segments.sum() == segments[0, -2:].sum() == 2
    assert pad_left([[1] * 33], 1)[0].shape == (1, 64)


def test_padded_lengths_are_few_and_close():
    lengths = {n: padded_length(n) for n in range(1, 3000)}
    assert all(n <= length for n, length in lengths.items())
    assert all(length <= 1.25 * n + 31 for n, length in lengths.items())
    assert len(set(lengths.values())) <= 30


def test_faults_of_a_call_are_told_in_words(small):
    with pytest.raises(
        ValueError, match=r"prompt 1 has 0 tokens, prompt 2 has 120 tokens; expected 1 to 116"
    ):
        reply_of(small, [[1], [], [1] * 120])
    with pytest.raises(ValueError, match=r"temperature=1.0 needs seeds"):
        reply_of(small, [[1]], temperature=1.0)
    with pytest.raises(ValueError, match="found 2 seeds for 1 prompts"):
        reply_of(small, [[1]], seeds=[1, 2], temperature=1.0)


def test_generate_imports_without_the_libraries_of_data_and_checkpoints():
    code = (
        "import sys, jaxtax.decoding; "
        "print([m for m in ('pydantic', 'grain', 'transformers', 'orbax', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_decoding_does_not_copy_the_experts():
    decoding = Decoding(4, (), 53)
    cfg = replace(GPT_OSS, moe=Moe(num_experts=512, experts_per_token=3))
    model = make_model(cfg)
    tokens = jnp.ones((2, 32), jnp.int32)
    state = start(model, tokens, tokens, jnp.zeros(2, jnp.uint32), decoding=decoding)
    compiled = advance.lower(model, state, 4, decoding=decoding).compile()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.stacks))
    assert compiled.memory_analysis().temp_size_in_bytes < weights / 10


def check_replies_on_a_mesh(cfg, sizes, **form):
    """Likeliest and sampled replies are those of one device, all at once, in batches, and as they grow."""
    model, mesh = mesh_cases.draw_model(cfg, **form), make_mesh(sizes)
    spread = jax.device_put(model, shardings(model, mesh))
    prompts, seeds = make_prompts(), [5, 2**32 - 1, 77, 0, 9]
    limits = {"vocab_limit": 97, "max_new_tokens": 12, "stop_ids": (3, 11), "prompt_length": 40}
    for how in ({}, {"seeds": seeds, "temperature": 0.8, "top_p": 0.9}, {"seeds": seeds, "temperature": 1.5}):
        alone = generate(model, prompts, **limits, **how)
        assert len({token for reply in alone for token in reply.tokens}) > 5
        with jax.set_mesh(mesh):
            assert generate(spread, prompts, **limits, **how) == alone
            if "top_p" in how:
                assert generate(spread, prompts, batch=3, **limits, **how) == alone
                assert list(stream(spread, prompts, **limits, **how))[-1] == alone


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [{"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "fsdp": 4}, {"expert": 8}, {"tensor": 8}]
)
def test_a_mesh_changes_no_reply_of_gpt_oss(sizes):
    check_replies_on_a_mesh(mesh_cases.GPT_OSS, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "expert": 4}])
def test_a_mesh_changes_no_reply_of_experts_in_4_bits(sizes):
    check_replies_on_a_mesh(mesh_cases.FOUR_BIT, sizes, experts="mxfp4")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}])
def test_a_mesh_changes_no_reply_of_qwen2(sizes):
    check_replies_on_a_mesh(mesh_cases.QWEN2, sizes)


def test_rows_are_filled_up_to_what_a_mesh_divides():
    assert filled_rows(5) == 5
    with jax.set_mesh(make_mesh({"data": 2, "expert": 3})):
        assert [filled_rows(rows) for rows in (1, 6, 7)] == [6, 6, 12]
    with jax.set_mesh(make_mesh({"tensor": 8})):
        assert filled_rows(5) == 5
