"""Plans that are kept: python -m jaxtax.plan.record configs/plans.json [WORD ...]

Makes the plans in the file anew, those whose command holds all of the words, and prints all as a table.
"""

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

GIB = 2**30
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
    report = plan["report"]
    sizes = {name: size / GIB for name, size in report["bytes_per_device"].items()}
    parts = ", ".join(f"{sizes[name]:.1f}" for name in ("params", "optimizer", "activations"))
    floor = report["seconds_floor"].values()
    seconds = sum(floor) if report["step"] == "train" else max(floor)
    speed = report["tokens_per_step"] / seconds / report["num_devices"]
    verdict = "fits" if report["fits"] else "does not fit"
    return (
        f"| `{plan['command']}` | {verdict} | {sizes['peak']:.1f} of {sizes['available']:.1f} | {parts} | "
        f"{speed:,.0f} |"
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


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
