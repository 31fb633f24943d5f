"""The `jaxtax` command: parse, call one function, say where the result is and what comes next.

Nothing heavy is imported before a verb needs it, so that `--help` and every refused config answer at once.
Results go to stdout, progress and faults to stderr. Exit codes: 0 done, 1 a training that diverged or failed
after it had begun, an artifact that is damaged or could not be written, 2 a fault of the command, its config
or its files, 42 a training that stood still, 75 told to leave (SIGTERM) with all that is needed to go on, 130
interrupted, 143 told to leave where nothing goes on; hosts/leave.py has those of runs in several processes.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import jaxtax
from jaxtax import cli_convert, cli_doctor, cli_plan
from jaxtax.cli_faults import as_a_process, faults_in_words
from jaxtax.cli_output import in_lines, open_progress, say
from jaxtax.hosts.leave import exits_hard
from jaxtax.hosts.memory import take_share
from jaxtax.hosts.start import start, start_alone

ORDER = ("study", "train", "eval", "report", "generate", "convert", "data", "show", "bench", "doctor", "plan")


def _put_over(example: str) -> Any:
    """Overrides of a config, with an example of them for the help."""
    return typer.Argument(metavar="KEY=VALUE", help=f"Put over the config: {example}", show_default=False)


ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, like those in configs/.")]
Overrides = list[str] | None


class Verbs(TyperGroup):
    """The verbs, in the order in which they are met."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)

    def invoke(self, ctx: Any) -> Any:
        with exits_hard(), faults_in_words(ctx):
            return super().invoke(ctx)


app = typer.Typer(
    cls=Verbs,
    help="Fine-tune gpt-oss and Qwen2-type models in JAX, and measure what safety training costs in "
    "reasoning.",
    epilog="study, train, eval and report take out=DIR. Stopped? The same command again goes on from there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(no_args_is_help=True)
app.add_typer(
    cli_convert.app,
    name="convert",
    help="Published models in and out (from-hf, to-hf, check).",
)
app.add_typer(data_app, name="data", help="Look at training data (data show CONFIG).")
app.command()(cli_doctor.doctor)
app.command()(cli_plan.plan)


def main() -> None:
    """The console script."""
    with as_a_process(sys.argv[1:]):
        app(prog_name="jaxtax")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"jaxtax {jaxtax.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _read(config: Path, overrides: list[str] | None, verb: str, *kinds: str) -> Any:
    """The checked config, for a `verb` that reads the configs of the verbs `kinds`, or else its own."""
    from jaxtax.config import EvalConfig, StudyConfig, TrainConfig
    from jaxtax.config_file import check_kind, closest_schema, load

    verbs = {"study": StudyConfig, "train": TrainConfig, "eval": EvalConfig}
    schema = verbs[closest_schema(config, {kind: verbs[kind] for kind in kinds or (verb,)})]
    check_kind(config, verb, schema, verbs)
    return load(config, overrides or [], schema)


@app.command()
def study(
    config: ConfigFile,
    overrides: Annotated[Overrides, _put_over("seeds=3 out=DIR base.epochs=2")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the stages and what is done; run none.")
    ] = False,
) -> None:
    """Run a whole study, from nothing to its report.

    Base, reasoning, safety arms, an evaluation of each epoch, and the report in out/report.
    """
    cfg = _read(config, overrides, "study")
    from jaxtax.owner import process_began
    from jaxtax.study import check, study

    if dry_run:
        for part in check(cfg):
            print(f"{'done' if part.done else 'to do':<5}  {part.name}  ({part.directory})")
        return
    start()
    with open_progress("study") as progress:
        report = study(cfg, progress=progress, began=process_began())
    say(report=report / "index.html", numbers=report / "summary.json", next=f"jaxtax show {cfg.out}")


@app.command()
def train(
    config: ConfigFile,
    overrides: Annotated[Overrides, _put_over("seed=3 out=DIR optimizer.beta1=0.8")] = None,
) -> None:
    """Train one model; it lands in out/model.

    The run directory `out` also holds the config as resolved, metrics.jsonl and the states to go on from.
    """
    cfg = _read(config, overrides, "train")
    _ = cfg.model.tokenizer_directory  # a fault that needs no meeting with other processes
    from jaxtax.owner import process_began
    from jaxtax.train.loop import train

    start(cfg.hosts)
    with open_progress("train") as progress:
        model = train(cfg, progress=progress, began=process_began())
    say(model=model, next=f"jaxtax eval CONFIG model={model} out=DIR")


@app.command(name="eval")
def evaluate(
    config: ConfigFile,
    overrides: Annotated[Overrides, _put_over("model=DIR out=DIR sampling.temperature=1")] = None,
) -> None:
    """Measure one model on the tasks of a config.

    The evaluation directory `out` holds every reply, every verdict and the summary.
    """
    cfg = _read(config, overrides, "eval")
    from jaxtax.evals.run import evaluate

    start()
    with open_progress("eval") as progress:
        out = evaluate(cfg, progress=progress)
    say(evaluation=out, next=f"jaxtax show {out}")


@app.command()
def report(
    study_dir: Annotated[Path, typer.Argument(metavar="STUDY_DIR", help="What jaxtax study made.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="out=DIR", help="Elsewhere than in the study.", show_default=False),
    ] = None,
) -> None:
    """Write the report of a study again, from its files."""
    from jaxtax.artifact import read_origin
    from jaxtax.config import ReportPlace
    from jaxtax.config_file import from_overrides

    place = from_overrides(overrides or [], ReportPlace)
    read_origin(study_dir, "study")
    from jaxtax.report.write import write_report

    out = write_report(study_dir, place.out)
    say(report=out / "index.html", numbers=out / "summary.json")


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model directory.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT|KEY=VALUE",
            help="Prompts (none: each line of stdin is one; on a terminal, a chat), and temperature=, "
            "top_p=, max_new_tokens=, repeats=, batch=, seed=, compute=, chat=, system.date=.",
            show_default=False,
        ),
    ] = None,
    effort: Annotated[str | None, typer.Option(help="How long to think: low, medium or high.")] = None,
    temperature: Annotated[str | None, typer.Option(help="0 (the default): the likeliest token.")] = None,
    top_p: Annotated[str | None, typer.Option(help="Choose among the likeliest tokens.")] = None,
    max_new_tokens: Annotated[str | None, typer.Option(help="Longest reply.")] = None,
    seed: Annotated[str | None, typer.Option(help="What chance depends on.")] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="PROMPTS", help="Prompts, .jsonl or .txt (a line each).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="REPLIES.jsonl", help="With --file: goes on where it was.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each reply as a line of JSON.")] = False,
    mesh: Annotated[list[str] | None, typer.Option(help="Devices, as in fsdp=8,tensor=2.")] = None,
) -> None:
    """Let a model reply: to prompts, in a chat, to a file of prompts.

    Thoughts and answer are shown apart.
    """
    flags = {"system.effort": effort, "temperature": temperature, "top_p": top_p, "seed": seed}
    flags["max_new_tokens"] = max_new_tokens
    from jaxtax.ask.verb import run

    start_alone("generate")
    replies = run(
        model, words or [], flags, file=file, out=out, as_json=as_json, mesh=mesh or (),
        open_progress=lambda: open_progress("generate"),
    )  # fmt: skip
    if replies is not None:
        say(replies=replies)


@data_app.command(name="show")
def data_show(
    config: ConfigFile,
    overrides: Annotated[Overrides, _put_over("chat=harmony")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Conversations of each data set.")] = 3,
) -> None:
    """Print training conversations as the model sees them.

    What it learns is colored. CONFIG is one of train or of study.
    """
    cfg = _read(config, overrides, "data show", "train", "study")
    from jaxtax.examples import print_training_data

    print_training_data(cfg, limit)


@app.command()
def show(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A model, run, evaluation, study or report.")
    ],
) -> None:
    """Describe anything that jaxtax made.

    What it is, from which command, its sizes, and whether its content still is what was recorded.
    """
    from jaxtax.show import describe

    description = describe(directory)
    print(in_lines(description.facts))
    if not description.intact:
        raise typer.Exit(1)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Which to run; none: all that fit here.", show_default=False),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers there.")
    ] = None,
) -> None:
    """Measure the speed of training and generation on this machine."""
    from jaxtax.bench import main as run

    take_share(os.environ)
    run(names or [], json_path)
