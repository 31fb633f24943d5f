"""A model directory in memory: logits and replies."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from pydantic import ValidationError

from jaxtax import checkpoint
from jaxtax.api.drawing import Drawing, DrawnReply
from jaxtax.api.prompts import Prompt, questions
from jaxtax.api.rows import as_ids, as_segments, positions
from jaxtax.chat.conversation import Effort
from jaxtax.chat.format import ChatFormat
from jaxtax.chat.formats import FORMATS, check_name, load_format
from jaxtax.checkpoint.model_directory import Description, read_description
from jaxtax.config import Ask
from jaxtax.config_words import dotted, said
from jaxtax.model.config import ModelConfig
from jaxtax.model.transformer import Transformer
from jaxtax.sharding import MESH_AXES, check_mesh, mesh_for_replies, on_mesh

Array = jax.Array
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class Model:
    """A model directory; `load_model` opens it.

    Attributes:
      directory: where it is.
      config: what the model is made of.
      dtype: of the computation.
      mesh: that the weights are spread over; None: one device.
      chat: name of the chat format; None: it is not known.
      verify: compare the weights with their recorded digest when they are read.
    """

    directory: Path
    config: ModelConfig
    dtype: str
    mesh: Mesh | None = None
    chat: str | None = None
    verify: bool = True

    @cached_property
    def transformer(self) -> Transformer:
        """The weights, as a pytree; read when they are first needed.

        Raises:
          DamagedError: they are not those that were written.
        """
        return checkpoint.load_model(self.directory, mesh=self.mesh, verify=self.verify)

    @cached_property
    def format(self) -> ChatFormat:
        """The chat format, bound to the model's tokenizer.

        Raises:
          ValueError: it is not known, or the tokenizer does not fit.
        """
        if self.chat is None:
            raise ValueError(
                f"{self.directory} does not say which chat format its model was trained with; give chat, "
                f"one of {', '.join(FORMATS)}"
            )
        return load_format(self.directory, chat=self.chat)

    def logits(self, tokens_BT: Any, segments_BT: Any = None) -> Array:
        """Scores of the token after each one, float32 [B, T, V]; compiled once per shape.

        Args:
          tokens_BT: ids; an array of numpy or jax, or nested lists.
          segments_BT: 1, 2, ... for texts that share a row (they do not see each other), 0 on padding, which
            may stand on either side; None: each row is one text.

        Raises:
          ValueError: no such rows, ids that the model does not have, a text beyond its context, or a model
            without a language head.
        """
        tokens_BT = as_ids(tokens_BT, self.config.vocab_size)
        segments_BT = as_segments(segments_BT, tokens_BT.shape)
        positions_BT = positions(segments_BT)
        if (longest := int(positions_BT.max()) + 1) > self.config.max_context:
            raise ValueError(
                f"found a text of {longest} tokens; this model's context is {self.config.max_context}"
            )
        with self.on_mesh():
            return _logits(self.transformer, tokens_BT, positions_BT, segments_BT, dtype=self.dtype)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        effort: Effort | None = None,
        batch: int = 16,
    ) -> list[DrawnReply]:
        """One reply to each prompt, in their order.

        A reply depends on its prompt, `seed` and the settings; of equal prompts each has its own.

        Args:
          prompts: texts (each one turn of a user), or chats: lists of Turns or of role and content.
          max_new_tokens: longest reply; None: 1024, or half of a smaller context.
          temperature: 0 takes the most likely token each time.
          top_p: choose among the most likely tokens whose probabilities reach this sum.
          effort: how long the model is to think, for chat formats that can tell it.
          batch: prompts computed at a time.

        Raises:
          ValueError: a setting, a prompt or its length that cannot be; nothing was computed.
        """
        system = None if effort is None else {"effort": effort}
        how = _checked(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, batch=batch,
            system=system,
        )  # fmt: skip
        asked = questions(prompts, seed=how.seed)
        job = Drawing(self, asked, how)
        replies = dict(pair for part in job.batches for pair in zip(part, job.draw(part), strict=True))
        return [replies[place] for place in range(len(asked))]

    def on_mesh(self) -> AbstractContextManager[Any]:
        """A context in which computations are spread as the weights are."""
        return on_mesh(self.mesh)


def load_model(
    directory: str | os.PathLike[str],
    mesh: Mesh | Mapping[str, int] | None = None,
    dtype: Any = None,
    *,
    chat: str | None = None,
    verify: bool = True,
) -> Model:
    """The model in a directory that jaxtax wrote, trained or converted.

    Args:
      mesh: spread the weights over it: sizes of its axes, as in {"fsdp": 8}, or a Mesh with the axes data,
        fsdp, expert and tensor; None, or a product of 1: all on the first device.
      dtype: of the computation, "float32", "bfloat16" or "float16"; None: the dtype of the stored weights.
        Weights stay as they are stored, 4-bit experts too; "float32" decodes those exactly.
      chat: another chat format than the one that the model was trained with.
      verify: compare the weights with the digest recorded for them (about 1 GB per second).

    Raises:
      ValueError: this is no model directory, no such dtype, or a mesh that does not divide the model.
      DamagedError: the weights are not those that were written.
    """
    model = open_model(directory, mesh, dtype, chat=chat, verify=verify)
    _ = model.transformer
    return model


def open_model(
    directory: str | os.PathLike[str],
    mesh: Mesh | Mapping[str, int] | None = None,
    dtype: Any = None,
    *,
    chat: str | None = None,
    verify: bool = True,
) -> Model:
    """As `load_model`, but the weights are read when they are first needed: prompts can be checked before."""
    directory = Path(directory)
    name = None if dtype is None else _dtype_name(dtype)
    if (directory / "config.json").exists() and any(directory.glob("*.safetensors")):
        raise ValueError(
            f"{directory} is a Hugging Face checkpoint, not a model directory; "
            f"jaxtax convert from-hf {directory} MODEL makes one of it"
        )
    described = read_description(directory)
    mesh = None if mesh is None else _as_mesh(mesh, described)
    if chat is not None:
        check_name(chat)
    return Model(directory, described.cfg, name or described.dtype, mesh, chat or described.chat, verify)


class Settings(TypedDict, total=False):
    """What Model.generate takes besides prompts, and where it is explained."""

    max_new_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    effort: Effort | None
    batch: int


def generate(
    model: Model | str | os.PathLike[str], prompts: Sequence[Prompt], **settings: Unpack[Settings]
) -> list[DrawnReply]:
    """One reply to each prompt, in their order; `model` may be a directory. See Model.generate."""
    model = model if isinstance(model, Model) else open_model(model)
    return model.generate(prompts, **settings)


@partial(jax.jit, static_argnames="dtype")
def _logits(
    model: Transformer, tokens_BT: Array, positions_BT: Array, segments_BT: Array, *, dtype: str
) -> Array:
    return model.logits(model(tokens_BT, positions_BT, segments_BT, dtype=dtype))


def _dtype_name(dtype: Any) -> str:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise ValueError(f"dtype: found {name!r}, expected one of {', '.join(DTYPES)}")
    return name


def _as_mesh(mesh: Mesh | Mapping[str, int], described: Description) -> Mesh | None:
    sizes = mesh.shape if isinstance(mesh, Mesh) else mesh
    known = set(MESH_AXES)
    if set(sizes) - known or (isinstance(mesh, Mesh) and set(sizes) != known):
        raise ValueError(
            f"mesh: found the axes {', '.join(map(str, sizes))}; expected {', '.join(MESH_AXES)}"
        )
    four_bit = described.experts == "mxfp4"
    if isinstance(mesh, Mesh):
        check_mesh(described.cfg, sizes, None, four_bit_experts=four_bit)
        return mesh
    return mesh_for_replies(described.cfg, sizes, four_bit_experts=four_bit)


def _checked(**settings: Any) -> Ask:
    try:
        return Ask(**settings)
    except ValidationError as error:
        raise ValueError("\n".join(said(error.errors(include_url=False), Ask, dotted))) from None
