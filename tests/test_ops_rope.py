"""Rotary embedding: gpt-oss's published constants, and the laws of a rotation."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtax.model.config import SIZES, Rope
from jaxtax.ops.rope import angles, frequencies, rotate, yarn_bounds

GPT_OSS = SIZES["gpt-oss-20b"].rope


def test_gpt_oss_bounds_are_not_rounded():
    low, high = yarn_bounds(GPT_OSS, 64)
    assert abs(low - 8.092779115512402) < 1e-12
    assert abs(high - 17.39802450158856) < 1e-12


def test_truncate_rounds_the_bounds_outward():
    rope = Rope(theta=150_000.0, factor=32.0, truncate=True)
    assert yarn_bounds(rope, 64) == (8, 18)


def test_gpt_oss_frequencies_and_concentration():
    inverse_J, concentration = frequencies(GPT_OSS, 64)
    assert abs(concentration - (0.1 * math.log(32.0) + 1.0)) < 1e-15
    published = {0: 1.0, 1: 0.68904430, 9: 0.0317056961, 31: 3.0235114e-07}
    for pair, value in published.items():
        np.testing.assert_allclose(inverse_J[pair], value, rtol=1e-6)


def test_without_extension_nothing_is_scaled():
    inverse_J, concentration = frequencies(Rope(theta=10_000.0), 8)
    assert concentration == 1.0
    np.testing.assert_allclose(inverse_J, 10_000.0 ** (-np.arange(4) / 4), rtol=1e-6)


def test_rotation_turns_split_halves_not_interleaved_pairs():
    positions_BT = jnp.array([[3]])
    cos_BTJ, sin_BTJ = angles(positions_BT, Rope(theta=100.0), 4)
    x_BTNH = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    c0, s0, c1, s1 = math.cos(3), math.sin(3), math.cos(0.3), math.sin(0.3)
    expected = [1 * c0 - 3 * s0, 2 * c1 - 4 * s1, 3 * c0 + 1 * s0, 4 * c1 + 2 * s1]
    np.testing.assert_allclose(rotate(x_BTNH, cos_BTJ, sin_BTJ)[0, 0, 0], expected, rtol=1e-5)


def test_products_depend_only_on_the_distance():
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, 1, 1, 1, 8)).astype(np.float32)
    rope = Rope(theta=50.0, factor=2.0, original_context=16)

    def product(q_position: int, k_position: int) -> float:
        turned = [
            rotate(jnp.asarray(x), *angles(jnp.array([[p]]), rope, 8))
            for x, p in ((q, q_position), (k, k_position))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert abs(product(9, 4) - product(105, 100)) < 1e-4
    assert abs(product(9, 4) - product(9, 5)) > 1e-3


def test_bf16_stays_bf16_and_near():
    x_BTNH = jnp.asarray(np.random.default_rng(1).normal(size=(1, 5, 2, 8)), jnp.float32)
    turn = angles(jnp.arange(5)[None], Rope(), 8)
    narrow = rotate(x_BTNH.astype(jnp.bfloat16), *turn)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(jnp.float32), rotate(x_BTNH, *turn), atol=0.03)


def test_gpt_oss_tables_are_those_of_transformers_at_every_position_of_its_context():
    torch = pytest.importorskip("torch")
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    from jaxtax.hf.config import to_hf_config

    fields = to_hf_config(SIZES["gpt-oss-20b"], dtype="bfloat16", experts="mxfp4")
    theirs = GptOssRotaryEmbedding(GptOssConfig(**{k: v for k, v in fields.items() if k != "architectures"}))
    positions = np.unique(np.r_[0:131_072:37, 4090:4100, 131_060:131_072])
    with torch.no_grad():
        tables = theirs(torch.zeros(1), torch.tensor(positions)[None])
    found = angles(jnp.asarray(positions)[None], GPT_OSS, 64)
    inverse_J, concentration = frequencies(GPT_OSS, 64)
    # Both are float32 angles: they may differ by a few units in the last place of the angle, and no more.
    allowed = concentration * (positions[:, None] * inverse_J * 2.0**-22 + 2e-6)
    for ours, other in zip(found, tables, strict=True):
        difference = np.abs(np.asarray(ours[0], np.float64) - other[0].double().numpy())
        assert ours.shape[-1] == other.shape[-1] == 32
        assert (difference <= allowed).all(), (difference / allowed).max()
    # Without these the test would pass for anything: the slow pairs have to be told apart far out.
    plain = angles(jnp.asarray(positions)[None], Rope(theta=GPT_OSS.theta), 64)
    assert (np.abs(np.asarray(plain[0][0]) - tables[0][0].numpy()) > allowed)[:, 20:].any(axis=0).all()
