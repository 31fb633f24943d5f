"""Which tensor of a published checkpoint is which array of ours: one table, read in both directions.

A row says the tensor's name in the file, the path of our array, and how the axes of the one become those of
the other (see layout.py). `expected` spells a table out for all layers of a model: it names every tensor of a
checkpoint exactly once and covers every array of the model exactly once (a test proves it).

    for name, places in expected(cfg, "mxfp4").items():
        for place in places:                        # one; three for a tensor that fuses q, k and v
            array = to_ours(tensor, place)          # belongs at ours[place.ours][place.slot]

A new family is one more function that yields rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxtax.hf.layout import inverse, parse, rearrange, shape
from jaxtax.model.config import ModelConfig

Experts = Literal["plain", "mxfp4"]
Form = Literal["hf", "openai"]
BLOCK = 32  # values that share a scale in MXFP4


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
      hf: name in the file; {i} stands for the layer. Rows of the same name are parts of one tensor, one after
        the other along its first axis.
      ours: path of the array; {s} stands for the stack.
      layout: from the tensor (or its part) to the array (of one layer). The letters are those of the shape
        suffixes, and: X and Z blocks of 32 along D and along F, Y bytes of a block, M labels.
      packed: bytes of 4-bit numbers, never cast; all other tensors are floating point.
    """

    hf: str
    ours: str
    layout: str
    packed: bool = False


@dataclass(frozen=True)
class Place:
    """Where a tensor, or a part of it, belongs.

    Attributes:
      hf: the tensor's name.
      ours: path of the array, as checkpoint.named_arrays gives it.
      slot: index along the array's leading axis, which counts the layers of a stack; None: no such axis.
      layout: from `hf_shape` (its `rows`) to `our_shape`.
      rows: which part of the tensor's first axis this is; None: all of it.
      hf_shape: of the whole tensor.
      array_shape: of the whole array, its leading axis included.
      packed: uint8 on both sides.
    """

    hf: str
    ours: str
    slot: int | None
    layout: str
    rows: slice | None
    hf_shape: tuple[int, ...]
    array_shape: tuple[int, ...]
    packed: bool

    @property
    def our_shape(self) -> tuple[int, ...]:
        """Of what belongs at this place: `array[slot]`, or all of the array."""
        return self.array_shape if self.slot is None else self.array_shape[1:]


def to_ours(tensor: np.ndarray, place: Place) -> np.ndarray:
    """What of the whole `tensor` belongs at `place`: a view of `our_shape`.

    Raises:
      ValueError: the tensor has another shape.
    """
    if tensor.shape != place.hf_shape:
        raise ValueError(f"{place.hf} has shape {tuple(tensor.shape)}, expected {place.hf_shape}")
    part = tensor if place.rows is None else tensor[place.rows]
    return rearrange(part, place.layout, _letters(place))


def to_hf(array: np.ndarray, place: Place) -> np.ndarray:
    """The tensor, or the `rows` of it, that `array` of `our_shape` stands for: a view.

    The parts of one tensor, concatenated along the first axis in the order of `expected`, are the tensor.

    Raises:
      ValueError: the array has another shape.
    """
    if array.shape != place.our_shape:
        raise ValueError(f"{place.ours} has shape {tuple(array.shape)}, expected {place.our_shape}")
    return rearrange(array, inverse(place.layout), _letters(place))


def _letters(place: Place) -> dict[str, int]:
    # On our side every axis is one letter.
    return dict(zip("".join(parse(place.layout)[1]), place.our_shape, strict=True))


def table(cfg: ModelConfig, experts: Experts = "plain", layout: Form = "hf") -> list[Row]:
    """The rows of a model: those that stand alone, then those of every layer.

    Args:
      cfg: of any family.
      experts: how the expert matrices are stored, in floating point or in 4 bits.
      layout: "hf" is that of transformers, "openai" that of gpt-oss's original/ directory.

    Raises:
      ValueError: there is no such form of this family.
    """
    if layout == "openai" and cfg.family != "gpt_oss":
        raise ValueError(
            f"only gpt_oss models have a checkpoint in OpenAI's original layout, not {cfg.family}"
        )
    if layout == "openai" and (cfg.num_labels is not None or cfg.tied_embedding):
        raise ValueError("OpenAI's original layout has a head of its own: no tied one, and none for labels")
    if experts == "mxfp4" and cfg.moe is None:
        raise ValueError(f"MXFP4 is a form of experts, and this {cfg.family} model has none")
    if layout == "openai":
        if experts == "plain":
            raise ValueError(
                "OpenAI's original layout has its experts in MXFP4; none was published otherwise"
            )
        return [*_openai_alone(), *_openai_layer()]
    mlp = _dense_mlp() if cfg.moe is None else _experts_mlp(experts)
    return [*_hf_alone(cfg), *_hf_attention(cfg), *mlp]


def expected(
    cfg: ModelConfig, experts: Experts = "plain", layout: Form = "hf"
) -> dict[str, tuple[Place, ...]]:
    """Every tensor of a checkpoint, by name, and where it belongs.

    Raises:
      ValueError: as `table`; or the model's sizes are not made of whole blocks of 32 for MXFP4.
    """
    sizes = _sizes(cfg, experts)
    rows = table(cfg, experts, layout)
    alone = [row for row in rows if "{i}" not in row.hf]
    layered = [row for row in rows if "{i}" in row.hf]
    found: dict[str, tuple[Place, ...]] = {}
    for layer, part in [(None, alone), *((i, layered) for i in range(cfg.num_layers))]:
        for hf in dict.fromkeys(row.hf for row in part):
            same = [row for row in part if row.hf == hf]
            found[hf.format(i=layer)] = tuple(_places(same, layer, cfg, sizes))
    return found


def optional(cfg: ModelConfig, layout: Form = "hf") -> dict[str, Place | None]:
    """Tensors that a checkpoint may hold besides the expected ones, and that nothing has to be kept of.

    A tied head may be stored a second time: it has to be, bit for bit, the array at its place. None: a buffer
    that is computed from the config (early Llama checkpoints hold the frequencies of the rotary embedding).
    """
    found: dict[str, Place | None] = {}
    if layout == "openai":
        return found
    if cfg.family == "llama":
        found |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": None for i in range(cfg.num_layers)}
    if cfg.tied_embedding:
        head = [Row("lm_head.weight", "embed", "V D -> V D")]
        found["lm_head.weight"] = next(_places(head, None, cfg, _sizes(cfg, "plain")))
    return found


def _places(rows: list[Row], layer: int | None, cfg: ModelConfig, sizes: dict[str, int]) -> Iterator[Place]:
    """The places of the rows that make up one tensor."""
    shapes = [shape(parse(row.layout)[0], sizes) for row in rows]
    whole = (sum(one[0] for one in shapes), *shapes[0][1:])
    group = len(cfg.windows)
    start = 0
    for row, part in zip(rows, shapes, strict=True):
        our_shape = shape(parse(row.layout)[1], sizes)
        yield Place(
            hf=row.hf.format(i=layer),
            ours=row.ours if layer is None else row.ours.format(s=layer % group),
            slot=None if layer is None else layer // group,
            layout=row.layout,
            rows=None if len(rows) == 1 else slice(start, start + part[0]),
            hf_shape=whole,
            array_shape=our_shape if layer is None else (cfg.depth, *our_shape),
            packed=row.packed,
        )
        start += part[0]


def _sizes(cfg: ModelConfig, experts: Experts) -> dict[str, int]:
    """What the letters of the layouts stand for."""
    sizes = {
        "V": cfg.vocab_size, "D": cfg.embed_dim, "F": cfg.mlp_dim, "H": cfg.head_dim, "N": cfg.num_heads,
        "K": cfg.num_kv_heads,
    }  # fmt: skip
    if cfg.num_labels is not None:
        sizes["M"] = cfg.num_labels
    if cfg.moe is not None:
        sizes |= {"E": cfg.moe.num_experts, "U": 2 * cfg.mlp_dim}
    if experts == "mxfp4":
        uneven = [f"{n}={s}" for n, s in (("embed_dim", sizes["D"]), ("mlp_dim", sizes["F"])) if s % BLOCK]
        if uneven:
            raise ValueError(f"MXFP4 needs sizes that are multiples of {BLOCK}; found {', '.join(uneven)}")
        sizes |= {"X": cfg.embed_dim // BLOCK, "Z": cfg.mlp_dim // BLOCK, "Y": BLOCK // 2}
    return sizes


def _hf_alone(cfg: ModelConfig) -> Iterator[Row]:
    yield Row("model.embed_tokens.weight", "embed", "V D -> V D")
    yield Row("model.norm.weight", "norm.scale", "D -> D")
    if cfg.num_labels is not None:
        yield Row("score.weight", "score", "M D -> M D")
    elif not cfg.tied_embedding:
        yield Row("lm_head.weight", "unembed", "V D -> V D")


def _hf_attention(cfg: ModelConfig) -> Iterator[Row]:
    """And both norms of a layer, which all families share."""
    hf, ours = "model.layers.{i}.", "stacks.{s}."
    yield Row(f"{hf}input_layernorm.weight", f"{ours}attention_norm.scale", "D -> D")
    for name, heads in (("q", "N"), ("k", "K"), ("v", "K")):
        to = f"{ours}attention.{name}"
        yield Row(f"{hf}self_attn.{name}_proj.weight", f"{to}.kernel", f"({heads} H) D -> D {heads} H")
        if cfg.qkv_bias:
            yield Row(f"{hf}self_attn.{name}_proj.bias", f"{to}.bias", f"({heads} H) -> {heads} H")
    yield Row(f"{hf}self_attn.o_proj.weight", f"{ours}attention.o.kernel", "D (N H) -> N H D")
    if cfg.out_bias:
        yield Row(f"{hf}self_attn.o_proj.bias", f"{ours}attention.o.bias", "D -> D")
    if cfg.sinks:
        yield Row(f"{hf}self_attn.sinks", f"{ours}attention.sinks", "N -> N")
    yield Row(f"{hf}post_attention_layernorm.weight", f"{ours}mlp_norm.scale", "D -> D")


def _dense_mlp() -> Iterator[Row]:
    """The gated MLP of Qwen2 and Llama."""
    for name, layout in (("gate", "F D -> D F"), ("up", "F D -> D F"), ("down", "D F -> F D")):
        yield Row(f"model.layers.{{i}}.mlp.{name}_proj.weight", f"stacks.{{s}}.mlp.{name}.kernel", layout)


def _experts_mlp(experts: Experts) -> Iterator[Row]:
    """The experts of gpt-oss: in floating point transposed to [E, in, out], in 4 bits [E, out, in]."""
    hf, ours = "model.layers.{i}.mlp.", "stacks.{s}.mlp."
    yield Row(f"{hf}router.weight", f"{ours}router.kernel", "E D -> D E")
    yield Row(f"{hf}router.bias", f"{ours}router.bias", "E -> E")
    if experts == "plain":
        yield Row(f"{hf}experts.gate_up_proj", f"{ours}up", "E D U -> E D U")
        yield Row(f"{hf}experts.down_proj", f"{ours}down", "E F D -> E F D")
    else:
        for theirs, name, axes in (("gate_up", "up", "E U X"), ("down", "down", "E D Z")):
            blocks, scales = f"{axes} Y -> {axes} Y", f"{axes} -> {axes}"
            yield Row(f"{hf}experts.{theirs}_proj_blocks", f"{ours}{name}.blocks", blocks, packed=True)
            yield Row(f"{hf}experts.{theirs}_proj_scales", f"{ours}{name}.scales", scales, packed=True)
    yield Row(f"{hf}experts.gate_up_proj_bias", f"{ours}up_bias", "E U -> E U")
    yield Row(f"{hf}experts.down_proj_bias", f"{ours}down_bias", "E D -> E D")


def _openai_alone() -> Iterator[Row]:
    yield Row("embedding.weight", "embed", "V D -> V D")
    yield Row("norm.scale", "norm.scale", "D -> D")
    yield Row("unembedding.weight", "unembed", "V D -> V D")


def _openai_layer() -> Iterator[Row]:
    """Names and shapes as gpt_oss/torch/{model,weights}.py of openai/gpt-oss reads them."""
    hf, ours = "block.{i}.", "stacks.{s}."
    yield Row(f"{hf}attn.norm.scale", f"{ours}attention_norm.scale", "D -> D")
    for name, heads in (("q", "N"), ("k", "K"), ("v", "K")):
        layout = f"({heads} H) D -> D {heads} H"
        yield Row(f"{hf}attn.qkv.weight", f"{ours}attention.{name}.kernel", layout)
    for name, heads in (("q", "N"), ("k", "K"), ("v", "K")):
        yield Row(f"{hf}attn.qkv.bias", f"{ours}attention.{name}.bias", f"({heads} H) -> {heads} H")
    yield Row(f"{hf}attn.sinks", f"{ours}attention.sinks", "N -> N")
    yield Row(f"{hf}attn.out.weight", f"{ours}attention.o.kernel", "D (N H) -> N H D")
    yield Row(f"{hf}attn.out.bias", f"{ours}attention.o.bias", "D -> D")
    yield Row(f"{hf}mlp.norm.scale", f"{ours}mlp_norm.scale", "D -> D")
    yield Row(f"{hf}mlp.gate.weight", f"{ours}mlp.router.kernel", "E D -> D E")
    yield Row(f"{hf}mlp.gate.bias", f"{ours}mlp.router.bias", "E -> E")
    for theirs, name, axes in (("mlp1", "up", "E U X"), ("mlp2", "down", "E D Z")):
        blocks, scales = f"{axes} Y -> {axes} Y", f"{axes} -> {axes}"
        yield Row(f"{hf}mlp.{theirs}_weight.blocks", f"{ours}mlp.{name}.blocks", blocks, packed=True)
        yield Row(f"{hf}mlp.{theirs}_weight.scales", f"{ours}mlp.{name}.scales", scales, packed=True)
        bias = "E U -> E U" if name == "up" else "E D -> E D"
        yield Row(f"{hf}mlp.{theirs}_bias", f"{ours}mlp.{name}_bias", bias)
