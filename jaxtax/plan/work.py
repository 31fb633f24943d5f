"""Floating-point operations of a model, counted on paper.

A product of [m, k] and [k, n] counts 2 m k n. Embedding lookups, norms and softmax count nothing.
"""

from dataclasses import dataclass

from jaxtax.model.config import ModelConfig


@dataclass(frozen=True)
class Work:
    """Operations per token of a row.

    Attributes:
      model: of a step without recomputation; where it trains, the backward direction of attention counts 2.5
        times its forward, as flash attention does it. This is what utilization is measured against.
      done: with what remat computes again.
    """

    model: float
    done: float


def training_work(cfg: ModelConfig, row_tokens: int, *, remat: str, freeze: tuple[str, ...]) -> Work:
    """Of one update, per token of a batch of full rows."""
    qkv, out, mlp, head = _products(cfg)
    attention = _attention(cfg, row_tokens)
    layers = cfg.num_layers * (qkv + out + mlp)
    # Each product has two more in the backward direction, one for its input and one for its weights.
    frozen = cfg.num_layers * mlp * ("experts" in freeze) + head * ("unembed" in freeze)
    model = 3 * (layers + head) - frozen + 3.5 * attention
    again = {"none": 0.0, "attn": layers - cfg.num_layers * qkv, "full": layers + attention}[remat]
    return Work(model, model + again)


def forward_work(cfg: ModelConfig, row_tokens: int) -> Work:
    """Of reading prompts, which needs the head at the last token of a row alone."""
    qkv, out, mlp, head = _products(cfg)
    forward = cfg.num_layers * (qkv + out + mlp) + head / row_tokens + _attention(cfg, row_tokens)
    return Work(forward, forward)


def decoding_work(cfg: ModelConfig, context: int) -> Work:
    """Of one more token after `context` tokens."""
    qkv, out, mlp, head = _products(cfg)
    seen = [context if window is None else min(window, context) for window in cfg.windows]
    attention = cfg.depth * sum(4.0 * cfg.num_heads * cfg.head_dim * keys for keys in seen)
    forward = cfg.num_layers * (qkv + out + mlp) + head + attention
    return Work(forward, forward)


def _products(cfg: ModelConfig) -> tuple[float, float, float, float]:
    """Per token: the projections before and after attention and the MLP in one layer, and the head."""
    dim, queries, keys = cfg.embed_dim, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    mlp = 6.0 * dim * cfg.mlp_dim
    if cfg.moe is not None:
        mlp = mlp * cfg.moe.experts_per_token + 2.0 * dim * cfg.moe.num_experts
    return 2.0 * dim * (queries + 2 * keys), 2.0 * queries * dim, mlp, 2.0 * dim * cfg.vocab_size


def _attention(cfg: ModelConfig, row_tokens: int) -> float:
    """Per token, all layers: scores and weighted sums over the keys that are seen, on average over a row."""
    total = 0.0
    for window in cfg.windows:
        most = row_tokens if window is None else min(window, row_tokens)
        keys = most * (most + 1) / 2 + (row_tokens - most) * most
        total += cfg.depth * 4.0 * cfg.num_heads * cfg.head_dim * keys / row_tokens
    return total
