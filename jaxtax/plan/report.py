"""What a plan found, as a table and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from jaxtax.plan.machines import GIB, KINDS


@dataclass(frozen=True)
class Way:
    """Something else that was compiled because the config as it stands does not fit.

    Attributes:
      overrides: what to put over the config, as on the command line.
      peak: bytes per device.
      fits: whether that is available.
    """

    overrides: tuple[str, ...]
    peak: int
    fits: bool


@dataclass(frozen=True)
class Report:
    """What one step of a config takes on a machine; bytes are per device, of the device that has most.

    Attributes:
      step: train, forward or decode.
      topology, num_devices, mesh: the machine, and how it is cut.
      model, experts, num_params: what is computed, and how its experts are held.
      bytes_per_device: params, optimizer, activations (all that lives only during the step, gradients
        included), peak, and what is available.
      fits: peak <= available.
      state_aliased: every array of the state is updated in place; None: there is none, or it did not compile,
        so that this, the collectives and what is said of arrays are not known.
      flops_per_token: of the model: 2 per weight and direction, attention by the keys that are seen.
      flops_per_token_done: with what remat computes again.
      tokens_per_step: over all devices.
      seconds_floor: of a step at the device's peak: `compute`, and at the bandwidth of its memory `update`
        (the optimizer's pass over gradients, weights and moments, after the rest) or `weights` (that
        generation reads, at the same time; experts as evenly routed tokens use them).
      collectives: kind -> count and bytes in one step (bytes of one device's larger side).
      loops_counted_once: loops with collectives in them that run an unknown number of times.
      largest_copy: bytes of the largest array that is only moved.
      largest_expanded: bytes of the largest array that holds all tokens of a device for all experts.
      extra_stacks: where arrays that hold the weights of all layers are more than gradients; see stacks.py.
      compile_seconds: tracing included.
      ways: what else was compiled, if this does not fit; `note`: what no compilation says.
    """

    config: str
    step: str
    topology: str
    num_devices: int
    mesh: dict[str, int]
    model: str
    experts: str
    num_params: int
    fits: bool
    state_aliased: bool | None
    bytes_per_device: dict[str, int]
    flops_per_token: float
    flops_per_token_done: float
    tokens_per_step: int
    seconds_floor: dict[str, float]
    collectives: dict[str, dict[str, int]]
    loops_counted_once: int
    largest_copy: int
    largest_expanded: int
    extra_stacks: list[dict[str, Any]]
    compile_seconds: float
    available_why: str
    ways: list[Way] = field(default_factory=list)
    note: str = ""

    @property
    def seconds(self) -> float:
        """The floor of a step."""
        parts = self.seconds_floor.values()
        return sum(parts) if self.step == "train" else max(parts)

    @property
    def speed(self) -> float:
        """Tokens per second and device, at most."""
        return self.tokens_per_step / self.seconds / self.num_devices

    @property
    def copied_stacks(self) -> list[dict[str, Any]]:
        """Those of `extra_stacks` that the compiler has no reason of its own for."""
        platform = KINDS[self.topology.partition(":")[0]].platform
        if platform == "cpu":  # it turns and widens stacks as it likes, and is there for trying things out
            return []
        return [one for one in self.extra_stacks if not (platform == "tpu" and _is_of_tpu(one))]

    def as_json(self) -> dict[str, Any]:
        """Of plain types."""
        return asdict(self)

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Self:
        """The report that `as_json` told."""
        ways = [Way(tuple(way["overrides"]), way["peak"], way["fits"]) for way in told["ways"]]
        return cls(**{**told, "ways": ways})


def table(report: Report) -> str:
    """The report in lines for people."""
    sizes = report.bytes_per_device
    mesh = ", ".join(f"{axis}={size}" for axis, size in report.mesh.items() if size > 1) or "one device"
    verdict = "fits" if report.fits else "does not fit"
    at_most = f"{report.speed:,.0f} tokens/s per device"
    rows = [
        ("step", f"{report.step}, {report.tokens_per_step:,} tokens"),
        ("model", f"{report.model}: {report.num_params:,} parameters"),
        ("machine", f"{report.topology}, {report.num_devices} devices ({mesh})"),
        ("memory", f"{verdict}: {_gib(sizes['peak'])} of {_gib(sizes['available'])} GiB on each device"),
        ("  parameters", f"{_gib(sizes['params'])} GiB"),
        ("  optimizer", f"{_gib(sizes['optimizer'])} GiB"),
        ("  activations", f"{_gib(sizes['activations'])} GiB, gradients included"),
        ("  available", report.available_why),
        ("state", _state(report)),
        ("work", _work(report)),
        ("at the peak", f"{report.seconds:.3g} s a step: {_parts(report.seconds_floor)}; {at_most}"),
    ]
    for kind, found in report.collectives.items():
        rows.append((kind, f"{found['count']:,} a step, {found['bytes'] / GIB:.3g} GiB"))
    if report.loops_counted_once:
        rows.append(("", f"counted once each: loops with collectives in them ({report.loops_counted_once})"))
    rows += [("copies", _copies(found)) for found in report.copied_stacks]
    rows.append(("compiled in", f"{report.compile_seconds:.0f} s"))
    for way in report.ways:
        fits = "fits" if way.fits else "does not fit"
        rows.append(("instead", f"{' '.join(way.overrides)}: {fits}, {_gib(way.peak)} GiB"))
    rows.append(("note", report.note))
    return "\n".join(f"{name:<20}  {value}" for name, value in rows if value)


def _is_of_tpu(found: dict[str, Any]) -> bool:
    """Whether an extra stack is no more than what the compiler for TPUs makes.

    It casts or turns the stacks of experts before the loop over layers, also where a layer takes its part of
    them behind an optimization barrier: one copy of each, in two bytes.
    """
    arrays, gradients = found["arrays"], found["gradients"]
    copies = [array for array in arrays if array.startswith("bf16")]
    return len(arrays) <= 2 * gradients and len(copies) >= len(arrays) - gradients


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB / 10 else f"{size / GIB:.2g}"


def _state(report: Report) -> str:
    in_place = {True: "updated in place, all of it", False: "NOT updated in place", None: "not compiled"}
    return "" if report.step == "forward" else in_place[report.state_aliased]


def _work(report: Report) -> str:
    done = report.flops_per_token_done
    more = f", {done / 1e9:.4g} with what is computed again" if done > report.flops_per_token else ""
    return f"{report.flops_per_token / 1e9:.4g} GFLOP a token{more}"


def _copies(found: dict[str, Any]) -> str:
    return (
        f"all layers' weights are among what lives during a step: {len(found['arrays'])} arrays of the size "
        f"of {found['stack']}, where gradients need {found['gradients']}"
    )


def _parts(floor: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds:.3g} s" for name, seconds in floor.items() if seconds)
