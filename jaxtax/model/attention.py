"""Attention of one layer: projections, rotary embedding, and the call into ops.attention."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxtax.model.cache import LayerCache
from jaxtax.model.config import ModelConfig
from jaxtax.model.layers import Linear, constant_param
from jaxtax.ops.attention import attend
from jaxtax.ops.attention_parallel import attend_rows
from jaxtax.ops.attention_rows import ATTENDED
from jaxtax.ops.rope import rotate
from jaxtax.sharding import ROWS, RowAxes, constrain

Array = jax.Array
AXES = {"D": "embed", "N": "heads", "K": "kv_heads", "H": "head_dim"}
SAVED_NAMES = ("qkv", ATTENDED)  # what remat "attn" keeps of a layer, besides its input


class Attention(nnx.Module):
    """Grouped-query attention over a band of `window` keys (None: all), with optional sinks."""

    def __init__(self, cfg: ModelConfig, *, window: int | None, rngs: nnx.Rngs, dtype: jnp.dtype):
        sizes = {"D": cfg.embed_dim, "N": cfg.num_heads, "K": cfg.num_kv_heads, "H": cfg.head_dim}

        def linear(pattern: str, bias: bool, gain: float = 1.0) -> Linear:
            return Linear(pattern, sizes, AXES, bias=bias, rngs=rngs, dtype=dtype, gain=gain)

        self.q = linear("BTD,DNH->BTNH", cfg.qkv_bias)
        self.k = linear("BTD,DKH->BTKH", cfg.qkv_bias)
        self.v = linear("BTD,DKH->BTKH", cfg.qkv_bias)
        # Branches into the residual stream start small so that deep stacks start near the identity.
        self.o = linear("BTNH,NHD->BTD", cfg.out_bias, gain=1.0 / math.sqrt(2 * cfg.num_layers))
        # One sink per query head. In the published sizes heads and head_dim are both 64, which hides a
        # mix-up.
        self.sinks = (
            constant_param((cfg.num_heads,), ("heads",), value=0.0, dtype=dtype) if cfg.sinks else None
        )
        self.window = window
        self.scale = 1.0 / math.sqrt(cfg.head_dim)

    def __call__(
        self,
        x_BTD: Array,
        rope: tuple[Array, Array],
        positions_BT: Array,
        segments_BT: Array,
        cache: LayerCache | None = None,
        rows: RowAxes = ROWS,
    ) -> tuple[Array, LayerCache]:
        """Mixes tokens of the same segment.

        Args:
          x_BTD: normalised inputs.
          rope: cosine and sine, each [B, T, J].
          positions_BT, segments_BT: as in Batch.
          cache: keys and values of earlier tokens; None means that the row itself is all there is.
          rows: how rows are spread over a mesh; a cache goes with whole rows.

        Returns:
          [B, T, D], and the keys and values this layer now knows: those of the row, or the updated cache.
        """
        q_BTNH = constrain(rotate(self.q(x_BTD, rows), *rope), *rows, "heads", None)
        k_BTKH = constrain(rotate(self.k(x_BTD, rows), *rope), *rows, "kv_heads", None)
        v_BTKH = constrain(self.v(x_BTD, rows), *rows, "kv_heads", None)
        q_BTNH, k_BTKH, v_BTKH = (checkpoint_name(x, SAVED_NAMES[0]) for x in (q_BTNH, k_BTKH, v_BTKH))
        known = LayerCache(k_BTKH, v_BTKH, positions_BT, segments_BT)
        sinks_N = None if self.sinks is None else self.sinks[...]
        more: dict[str, Any] = {"window": self.window, "scale": self.scale, "sinks_N": sinks_N}
        if cache is None:
            more |= {"positions_BT": positions_BT, "segments_BT": segments_BT, "rows": rows}
            mixed_BTNH = attend_rows(q_BTNH, k_BTKH, v_BTKH, **more)
        else:
            known = cache.write(known)
            mixed_BTNH = attend(
                q_BTNH,
                known.k_BSKH,
                known.v_BSKH,
                q_positions_BT=positions_BT,
                k_positions_BS=known.positions_BS,
                q_segments_BT=segments_BT,
                k_segments_BS=known.segments_BS,
                **more,
            )
        return self.o(checkpoint_name(mixed_BTNH, SAVED_NAMES[1]), rows), known
