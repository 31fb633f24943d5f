"""Plans that are kept: python -m jaxtax.plan.record configs/plans.json [WORD ...]

Makes the plans in the file anew, those whose command holds all of the words, and prints all as a table.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxtax.artifact import write_json
from jaxtax.plan.machines import GIB
from jaxtax.plan.report import Report

_HEADER = (
    "| `jaxtax plan` | | GiB per device | weights, optimizer, rest | at most, tokens/s per device |\n"
    "|---|---|---|---|---|"
)


def make(command: str) -> dict[str, Any]:
    """The report of `jaxtax plan COMMAND`, by a process of its own.

    Raises:
      subprocess.CalledProcessError: the command failed.
    """
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / "plan.json"
        run = [sys.executable, "-m", "jaxtax", "plan", *shlex.split(command), "--json", str(found)]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        return json.loads(found.read_text(encoding="utf-8"))


def versions() -> dict[str, str]:
    """Of what compiles."""
    return {name: version(name) for name in ("jax", "jaxlib")}


def as_markdown(plans: Sequence[Mapping[str, Any]]) -> str:
    """A table of plans, a line each."""
    return "\n".join([_HEADER, *map(_line, plans)])


def _line(plan: Mapping[str, Any]) -> str:
    report = Report.from_json(plan["report"])
    sizes = {name: size / GIB for name, size in report.bytes_per_device.items()}
    parts = ", ".join(f"{sizes[name]:.1f}" for name in ("params", "optimizer", "activations"))
    verdict = "fits" if report.fits else "does not fit"
    return (
        f"| `{plan['command']}` | {verdict} | {sizes['peak']:.1f} of {sizes['available']:.1f} | {parts} | "
        f"{report.speed:,.0f} |"
    )


def main(path: Path, words: Sequence[str]) -> None:
    """Makes the plans of `path` anew whose command holds all `words`; each is written as it is done."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    for plan in kept["plans"]:
        if all(word in plan["command"] for word in words):
            print(plan["command"], file=sys.stderr)
            plan["report"], plan["versions"] = make(plan["command"]), versions()
            write_json(path, kept)
    print(as_markdown(kept["plans"]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxtax.plan.record",
        usage="%(prog)s FILE [WORD ...]",
        description="Makes kept plans anew, and prints all as a table.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the plans, such as configs/plans.json")
    # Also words such as --decode.
    parser.add_argument(
        "words", nargs=argparse.REMAINDER, metavar="WORD", help="only plans whose command holds all of them"
    )
    given = parser.parse_args()
    if not given.file.is_file():
        parser.error(f"{given.file}: no such file; expected kept plans, such as configs/plans.json")
    return given


if __name__ == "__main__":
    told = _arguments()
    main(told.file, told.words)
