"""`jaxtax generate`: which of its forms is meant; imports what is heavy only once all is well."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxtax.artifact import read_origin
from jaxtax.config import Ask
from jaxtax.config_file import ConfigError, from_overrides
from jaxtax.progress import Progress


def run(
    model: Path,
    words: Sequence[str],
    flags: Mapping[str, str | None],
    *,
    file: Path | None,
    out: Path | None,
    as_json: bool,
    mesh: Sequence[str] = (),
    open_progress: Callable[[], Progress],
) -> Path | None:
    """Replies to prompts, chats, or answers a file, into the path that is returned.

    Args:
      words: prompts and settings as key=value.
      flags: settings by key; None: not given.
      mesh: sizes of its axes, as in ["fsdp=8,tensor=2"].
      open_progress: makes what shows how far a file is.

    Raises:
      ValueError: settings, a model directory or prompts that cannot be; nothing was computed.
    """
    overrides = [word for word in words if re.fullmatch(r"[a-z_.]+=\S*", word)]
    prompts = [word for word in words if word not in overrides]
    overrides += [f"{key}={value}" for key, value in flags.items() if value is not None] + mesh_settings(mesh)
    how = from_overrides(overrides, Ask)
    if not any(model.glob("*.safetensors")):  # a foreign checkpoint gets a better answer when it is loaded
        read_origin(model, "model")
    if file is not None or out is not None:
        if file is None or out is None or prompts:
            raise ConfigError(["--file PROMPTS and --out REPLIES.jsonl go together, and without a prompt"])
        from jaxtax.ask.file import answer_file

        try:
            with open_progress() as progress:
                return answer_file(model, file, out, how, progress=progress)
        except KeyboardInterrupt:
            print(f"\n{out} keeps what is answered; the same command again goes on", file=sys.stderr)
            raise
    if not prompts and sys.stdin.isatty() and not as_json:
        _chat(model, how)
        return None
    prompts = prompts or [line.strip() for line in sys.stdin if line.strip()]
    if not prompts:
        raise ConfigError(["found no prompt; give one in quotes, or one per line on stdin"])
    from jaxtax.api import open_model
    from jaxtax.ask.print import ask

    ask(open_model(model, how.mesh.model_dump(), how.compute, chat=how.chat), prompts, how, as_json=as_json)
    return None


def mesh_settings(sizes: Sequence[str]) -> list[str]:
    """Settings key=value for the mesh that was given as in ["fsdp=8,tensor=2"].

    Raises:
      ConfigError: naming all that are no axis=size.
    """
    given = [size.strip() for several in sizes for size in several.split(",")]
    bad = [size for size in given if not re.fullmatch(r"[a-z_]+=\S+", size)]
    if bad:
        raise ConfigError(
            [f"--mesh: found {size!r}; expected axis=size, as in fsdp=8,tensor=2" for size in bad]
        )
    return [f"mesh.{size}" for size in given]


def _chat(model: Path, how: Ask) -> None:
    from jaxtax.api import load_model
    from jaxtax.ask.chat import chat

    chat(load_model(model, how.mesh.model_dump(), how.compute, chat=how.chat), how)
