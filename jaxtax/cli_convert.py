"""The verbs of `jaxtax convert`: published models in, out, and held against each other."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from jaxtax.cli_output import open_progress, say
from jaxtax.hosts.start import start

app = typer.Typer(no_args_is_help=True)

Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option(help="Of floating-point weights; else as they were published."),
]
Experts = Annotated[
    Literal["plain", "mxfp4"] | None,
    typer.Option(help="In floating point or in 4 bits; else as they were published."),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Threads; else one per core, at most 8.")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="Must not exist.")]


@app.command(name="from-hf")
def from_hf(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="A published model, or gpt-oss's original/.")],
    dst: Destination,
    dtype: Dtype = None,
    experts: Experts = None,
    chat: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="Its chat format; else what the tokenizer tells.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where its tokenizer.json is; else in SRC.")
    ] = None,
    workers: Workers = None,
) -> None:
    """Make a model directory of a Hugging Face checkpoint."""
    from jaxtax.checkpoint.model_directory import read_description
    from jaxtax.hf.from_hf import from_hf

    start()
    with open_progress("convert") as progress:
        made = from_hf(
            src, dst, dtype=dtype, experts=experts, chat=chat, tokenizer=tokenizer, workers=workers,
            progress=progress,
        )  # fmt: skip
    format_name = read_description(made).chat or "not known"
    why = "" if chat else ", by its tokenizer; one trained in another (s1.1 in s1) needs --chat FORMAT"
    say(model=made, chat=f"{format_name}{why}", next=f"jaxtax convert check {src} {made}")


@app.command(name="to-hf")
def to_hf(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory.")],
    dst: Destination,
    dtype: Dtype = None,
    experts: Experts = None,
    original: Annotated[
        Path | None,
        typer.Option(metavar="SRC", help="The published model: experts with its values keep its bytes."),
    ] = None,
    workers: Workers = None,
) -> None:
    """Write a model as transformers and vLLM load it."""
    from jaxtax.hf.to_hf import as_table, to_hf

    start()
    with open_progress("convert") as progress:
        made = to_hf(
            model, dst, dtype=dtype, experts=experts, original=original, workers=workers, progress=progress
        )
    if made.rounded:
        print(as_table(made.rounded))
    say(checkpoint=made.directory, dtype=made.dtype, experts=made.experts)


@app.command()
def check(
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A published model.")],
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory.")],
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the certificate there.")
    ] = None,
) -> None:
    """Prove a model equal to a published one.

    Exit code 1 when it is not. Every tensor, and where torch is installed the computation of every layer
    against transformers.
    """
    from jaxtax.artifact import write_json
    from jaxtax.hf.check import as_table, check

    start()
    with open_progress("check") as progress:
        certificate = check(hf_dir, model, progress=progress)
    if json_path is not None:
        write_json(json_path, certificate)
    print(as_table(certificate))
    if not certificate["passed"]:
        raise typer.Exit(1)
