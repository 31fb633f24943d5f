"""Model directories: weights, config, tokenizer and origin, written as a whole or not at all.

model/   config.json     ModelConfig's fields, `chat` and `system` (what it was trained with), `dtype`, and
                         `experts`: "plain", or "mxfp4" where they are in 4 bits
         params/         Orbax tree of arrays
         tokenizer.json  and its companions
         source/         if it descends from a published model: what an export needs of that (hf/source.py)
         origin.json     kind, command, versions, digest, number of parameters (see artifact.py)
"""

import dataclasses
import functools
import shutil
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxtax import artifact
from jaxtax.artifact import ORIGIN, DamagedError
from jaxtax.chat.tokenizer import TOKENIZER_FILES
from jaxtax.checkpoint.arrays import beside, load_placed, named_arrays, save_arrays, tree_seen_by_all
from jaxtax.checkpoint.placing import digest_stored
from jaxtax.checkpoint.room import check_room
from jaxtax.checkpoint.together import together
from jaxtax.hosts.first import SHOWS
from jaxtax.model.config import ModelConfig, Moe, Rope, count_parameters
from jaxtax.model.four_bit import experts_form
from jaxtax.model.mlp import ExpertsForm
from jaxtax.model.transformer import Transformer

MODEL_FILES = ("config.json", "params", "tokenizer.json", ORIGIN)
SOURCE = "source"


@dataclass(frozen=True)
class Description:
    """What a model directory says of its weights.

    Attributes:
      dtype: of all floating-point weights, as in "bfloat16".
      chat: the format that the model was trained with, an entry of chat.formats.FORMATS; None: not known.
      system: what its system message said, the keys of config.SystemMessage; None: it had none of its own.
    """

    cfg: ModelConfig
    dtype: str
    experts: ExpertsForm = "plain"
    chat: str | None = None
    system: Mapping[str, Any] | None = None


def describing_files(directory: Path) -> list[str]:
    """What makes a model besides its weights: with one of these changed, it is another model."""
    source = [path.relative_to(directory).as_posix() for path in (directory / SOURCE).glob("*")]
    return ["config.json", *TOKENIZER_FILES, *sorted(source)]


def save_model(
    directory: Path,
    model: Transformer,
    *,
    tokenizer_dir: Path,
    chat: str,
    origin: Mapping[str, Any],
    system: Mapping[str, Any] | None = None,
    what: str = "the model",
) -> None:
    """Writes a model directory, beside first and renamed at last: it is there as a whole or not at all.

    Of several processes all call this, with a directory on a disk that all of them see: each writes its part
    of the weights, the first the rest.

    Args:
      directory: must not exist.
      model: any sharding.
      tokenizer_dir: whose tokenizer files are copied, and, if it is a model directory, its source/.
      chat, system: see Description.
      origin: what else belongs in origin.json (what the model was made from).
      what: it is, for the names of waits: no path, because processes may have been given different ones.

    Raises:
      ValueError: `directory` exists, or the weights are of several floating-point dtypes.
      FailedError: in all processes, if one could not write its part; nothing of it stays.
    """
    if directory.exists():
        raise ValueError(f"{directory} exists already; a model is never written over, remove it first")
    arrays = named_arrays(model)
    dtype = _floating_dtype(arrays)
    described = Description(model.cfg, dtype, experts_form(model), chat, system)
    first = jax.process_index() == 0
    room = functools.partial(check_room, directory, arrays)
    together(f"room for {what}", lambda: room() if first else None)
    with beside(directory, what) as fresh:
        params = fresh / "params"
        together(f"writing the weights of {what}", lambda: save_arrays(params, arrays))
        digests = _digests(params, arrays, what)

        def finish() -> None:
            if first:
                describe(fresh, described, tokenizer_dir)
                seal(fresh, described, digests, origin)

        together(f"writing what belongs to {what}", finish)


def _digests(params: Path, arrays: Mapping[str, Any], what: str) -> dict[str, str]:
    """Digests of arrays that were written: of several processes none has all, so they read them again."""
    if jax.process_count() == 1:
        return artifact.digest_arrays(arrays)
    wait = f"the written weights of {what}"
    # Orbax's first process has renamed what all have written; the others may see that later.
    tree = tree_seen_by_all(params, str(params), wait=wait, seconds=SHOWS)
    return digest_stored(tree, arrays, str(params), wait=wait)


def describe(directory: Path, described: Description, tokenizer_dir: Path | None = None) -> None:
    """Writes all of a model directory but its weights and its origin.

    Args:
      tokenizer_dir: whose tokenizer files and source/ are copied; None: they are there already.
    """
    config = dataclasses.asdict(described.cfg)
    config |= {"chat": described.chat, "dtype": described.dtype, "experts": described.experts}
    if described.system is not None:
        config["system"] = dict(described.system)
    artifact.write_json(directory / "config.json", config)
    if tokenizer_dir is None:
        return
    for name in TOKENIZER_FILES:
        if (tokenizer_dir / name).exists():
            shutil.copyfile(tokenizer_dir / name, directory / name)
    if (tokenizer_dir / SOURCE).is_dir():
        shutil.copytree(tokenizer_dir / SOURCE, directory / SOURCE, copy_function=shutil.copyfile)


def seal(
    directory: Path, described: Description, digests: Mapping[str, str], origin: Mapping[str, Any]
) -> None:
    """Writes the origin of a model directory that has everything else.

    Args:
      digests: artifact.digest_arrays of its arrays.
    """
    record = {
        "digest": artifact.combine_arrays(digests),
        "array_digests": dict(sorted(digests.items())),
        "file_digests": artifact.file_digests(directory, describing_files(directory)),
        "parameters": count_parameters(described.cfg),
    }
    artifact.write_origin(directory, "model", **record, **origin)


def _floating_dtype(arrays: Mapping[str, Any]) -> str:
    found: dict[str, list[str]] = defaultdict(list)
    for name, array in arrays.items():
        if jnp.issubdtype(array.dtype, jnp.floating):
            found[array.dtype.name].append(name)
    if len(found) == 1:
        return next(iter(found))
    listed = "; ".join(
        f"{dtype}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for dtype, names in found.items()
    )
    raise ValueError(
        f"a model directory has one floating-point dtype, and this model has {len(found)} ({listed}); cast "
        "it with jaxtax.model.four_bit.cast_floating"
    )


def read_model_config(directory: Path) -> ModelConfig:
    """What the model in `directory` is made of, without reading its weights.

    Raises:
      ValueError: this is not a (whole) model directory; the message says what is missing.
    """
    return read_description(directory).cfg


def load_model(
    directory: Path,
    *,
    mesh: Mesh | None = None,
    param_dtype: Any = None,
    verify: bool = True,
    what: str = "the model",
) -> Transformer:
    """The model in `directory`.

    Args:
      directory: written by `save_model`.
      mesh: spread over it as sharding.shardings says; None: all on the first device.
      param_dtype: of the floating-point weights; None: as they are stored. Experts in 4 bits stay so.
      verify: compare all with the digests in origin.json (hashes about 1 GB per second).
      what: as of `save_model`.

    Raises:
      ValueError: this is not a (whole) model directory.
      DamagedError: the weights cannot be read, or they or the tokenizer are not those that were saved.
    """
    described = read_description(directory)
    if verify and (changed := artifact.changed_files(directory, describing_files(directory))):
        what = f"{', '.join(changed)} of {directory} changed since {ORIGIN} was written"
        raise DamagedError(f"{what}; make the model again, or copy it again from where it came")
    origin = artifact.read_origin(directory, "model")
    abstract = _abstract_model(described.cfg, described.dtype, described.experts)
    model, digests = load_placed(
        directory / "params",
        abstract,
        mesh,
        f"the weights of {directory}",
        wait=f"the weights of {what}",
        dtype=param_dtype,
        hashed=verify,
    )
    if verify:
        _check_digests(directory, digests, origin)
    return model


def _check_digests(directory: Path, digests: Mapping[str, str], origin: Mapping[str, Any]) -> None:
    """Compares the digests of arrays with what was recorded; older models have only one digest of all."""
    recorded, digest = origin.get("array_digests", {}), origin["digest"]
    bad = sorted(name for name, one in recorded.items() if digests.get(name) != one)
    if not bad and artifact.combine_arrays(digests) == digest:
        return
    named = f"{', '.join(bad[:5])}{f' and {len(bad) - 5} more' if len(bad) > 5 else ''}: " if bad else ""
    what = (
        f"the weights of {directory} are damaged: {named}not of the digest {digest[:12]}... in its {ORIGIN}"
    )
    raise DamagedError(f"{what}; make it again, or copy it again from where it came")


@functools.lru_cache(maxsize=8)
def _abstract_model(cfg: ModelConfig, dtype: str, experts: ExpertsForm) -> Transformer:
    def make() -> Transformer:
        return Transformer(cfg, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype), experts=experts)

    return jax.eval_shape(make)


def read_description(directory: Path) -> Description:
    """What the config.json of a model directory says.

    Raises:
      ValueError: this is not a (whole) model directory; the message says what is missing.
    """
    _check_whole(directory)
    try:
        fields = artifact.read_json(directory / "config.json")
        said = {name: fields.pop(name) for name in ("dtype", "chat")}
        said |= {name: fields.pop(name) for name in ("experts", "system") if name in fields}
        if said.get("experts", "plain") not in ("plain", "mxfp4"):
            raise ValueError(f"experts is {said['experts']!r}")
        fields["windows"] = tuple(fields["windows"])
        fields["rope"] = Rope(**fields["rope"])
        fields["moe"] = None if fields["moe"] is None else Moe(**fields["moe"])
        return Description(ModelConfig(**fields), **said)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"its config.json was not written by jaxtax ({artifact.in_words(error)})"
        raise ValueError(f"{directory} is not a model directory: {why}") from error


def _check_whole(directory: Path) -> None:
    needed = "a training run writes one to OUT/model"
    if not directory.is_dir():
        kind = "it is a file" if directory.exists() else "it does not exist"
        raise ValueError(f"{directory} is not a model directory: {kind}; {needed}")
    missing = [name for name in MODEL_FILES if not (directory / name).exists()]
    if missing:
        inside = directory / "model"
        if (inside / "config.json").exists():
            needed = f"but {inside} is one"
        raise ValueError(f"{directory} is not a model directory: no {', '.join(missing)} in it; {needed}")
