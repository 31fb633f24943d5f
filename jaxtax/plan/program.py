"""What a compiled program says about itself: XLA's text of it, read for what nothing else tells.

The text is HLO after optimization, for one device: computations, each a list of instructions
`%name = type opcode(operands), attributes`. Loops say how often they run, where XLA knows it.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "token": 0}
_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_BODY = re.compile(r"\bbody=%?([\w.-]+)")
_INDEX = re.compile(r"\bindex=(\d+)")
_TRIPS = re.compile(r'"?known_trip_count"?:\{"n":"?(\d+)')
_SLICED = "dynamic-update-slice"
# Instructions whose result is no array of its own. What is started is counted where it is done.
_NO_ARRAY = {
    "parameter", "tuple", "get-tuple-element", "while", "conditional", "call", "bitcast", "opt-barrier",
    "constant", "async-start", "async-done", "async-update", "after-all", "iota",
    "copy-start", *(f"{kind}-start" for kind in _COLLECTIVES),
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One line: `arrays` are (dtype, shape) of its result, `rest` all after the opcode."""

    name: str
    opcode: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    type: str
    rest: str

    @property
    def bytes(self) -> int:
        """Of its result."""
        return sum(size_of(dtype, shape) for dtype, shape in self.arrays)


@dataclass
class Collectives:
    """How often and with how many bytes the devices talk in one run of the program.

    Attributes:
      count, bytes: by kind of collective; the bytes of one device's larger side (of an all-gather its result,
        of a reduce-scatter its operand).
      uncounted: loops with collectives in them of which XLA does not say how often they run; counted once.
    """

    count: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    uncounted: int = 0

    def add(self, other: "Collectives", times: int) -> None:
        """Takes in `times` runs of a part."""
        for kind, count in other.count.items():
            self.count[kind] = self.count.get(kind, 0) + times * count
            self.bytes[kind] = self.bytes.get(kind, 0) + times * other.bytes[kind]
        self.uncounted += other.uncounted


class Program:
    """The text of a compiled program, taken apart."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._entry, self._computations, self._roots = _parse(text)

    @property
    def aliased_outputs(self) -> set[int]:
        """Which outputs, counted in order, are written where a donated argument was."""
        header = self._text[: self._text.find("\n")]
        return {int(index) for index in re.findall(r"\{(\d+)\}: \(\d+, \{\}", header)}

    @cached_property
    def collectives(self) -> Collectives:
        """Of one run, loops counted."""
        known: dict[str, Collectives] = {}
        return self._talk(self._entry, known)

    def arrays(self) -> Iterator[tuple[Instruction, str, tuple[int, ...]]]:
        """Every array that memory is taken for, with its dtype and shape.

        Not what stays inside a fusion, what is written over a donated argument, what a loop hands on to its
        next round, in the place of what it was given, and an array of which a slice is written anew.
        """
        fused, loops = set[str](), set[str]()
        for instruction in itertools.chain(*self._computations.values()):
            if instruction.opcode == "fusion":
                fused.update(_CALLED.findall(instruction.rest))
            elif instruction.opcode == "while":
                loops.update(_BODY.findall(instruction.rest))
        for name, body in self._computations.items():
            if name in fused:
                continue
            in_place = self._handed_on(name, None if name in loops else self.aliased_outputs)
            for instruction in body:
                if instruction.opcode not in _NO_ARRAY:
                    for index, array in enumerate(instruction.arrays):
                        if (instruction.name, index) not in in_place | self._sliced(instruction):
                            yield instruction, *array

    def _handed_on(self, name: str, outputs: set[int] | None) -> set[tuple[str, int]]:
        """What makes those of the results of a loop's body (None: all), or of the program, that have a place
        already: instructions, and which of the arrays of each."""
        if name != self._entry and outputs is not None:
            return set()
        known = {instruction.name: instruction for instruction in self._computations[name]}
        return {
            _maker(known, result)
            for index, result in enumerate(_results(known[self._roots[name]]))
            if outputs is None or index in outputs
        }

    def _sliced(self, instruction: Instruction) -> set[tuple[str, int]]:
        """Which arrays of an instruction are those that it was given, with a new slice."""
        if instruction.opcode == _SLICED:
            return {(instruction.name, 0)}
        if instruction.opcode != "fusion":
            return set()
        inside = _CALLED.findall(instruction.rest)[0]
        known = {inner.name: inner for inner in self._computations[inside]}
        results = enumerate(_results(known[self._roots[inside]]))
        return {
            (instruction.name, index)
            for index, result in results
            if known[_maker(known, result)[0]].opcode == _SLICED
        }

    def copies(self) -> Iterator[tuple[Instruction, str, tuple[int, ...]]]:
        """Those of `arrays` that only move numbers: copies, transposes, and fusions of them."""
        for instruction, dtype, shape in self.arrays():
            if instruction.opcode in ("copy", "copy-done", "transpose") or re.match(
                r"(wrapped_|loop_|input_)*(copy|transpose)", instruction.name
            ):
                yield instruction, dtype, shape

    def _talk(self, name: str, known: dict[str, Collectives]) -> Collectives:
        if name in known:
            return known[name]
        total = known[name] = Collectives()
        body = self._computations.get(name, [])
        sizes = {instruction.name: instruction.bytes for instruction in body}
        for instruction in body:
            if kind := _kind(instruction.opcode):
                size = _larger_side(instruction, sizes)
                total.add(Collectives({kind: 1}, {kind: size}), 1)
            elif instruction.opcode == "while":
                total.add(*self._looped(instruction, known))
            else:
                for called in _called(instruction):
                    total.add(self._talk(called, known), 1)
        return total

    def _looped(self, loop: Instruction, known: dict[str, Collectives]) -> tuple[Collectives, int]:
        inside = Collectives()
        for part in re.findall(r"\b(?:body|condition)=%?([\w.-]+)", loop.rest):
            inside.add(self._talk(part, known), 1)
        trips = self._trips(loop)
        if trips is None and inside.count:
            inside.uncounted += 1
        return inside, trips or 1

    def _trips(self, loop: Instruction) -> int | None:
        if known := _TRIPS.search(loop.rest):
            return int(known[1])
        # The compiler for TPUs does not say it, but there scans still count from 0 to a constant.
        condition = re.search(r"\bcondition=%?([\w.-]+)", loop.rest)
        body = self._computations.get(condition[1], []) if condition else []
        numbers = {i.name: i.rest.partition(")")[0] for i in body if i.opcode == "constant"}
        if body and body[-1].opcode == "compare" and "direction=LT" in body[-1].rest:
            bound = numbers.get(_operands(body[-1])[-1], "")
            return int(bound) if bound.isdigit() else None
        return None


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of an array, without padding."""
    bits = re.search(r"\d+", dtype)
    each = _BYTES.get(dtype) or (int(bits[0]) / 8 if bits else 0)
    return math.ceil(each * math.prod(shape))


def _parse(text: str) -> tuple[str, dict[str, list[Instruction]], dict[str, str]]:
    """The name of the first computation that runs; all of them; and the name of the last result of each."""
    entry, name, body = "", "", []
    computations: dict[str, list[Instruction]] = {}
    roots: dict[str, str] = {}
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").partition(" ")[0].removeprefix("%")
            body = computations[name] = []
            entry = name if line.startswith("ENTRY ") else entry
        elif " = " in line and line.startswith(" ") and (instruction := _instruction(line)):
            body.append(instruction)
            if line.lstrip().startswith("ROOT "):
                roots[name] = instruction.name
    return entry, computations, roots


def _instruction(line: str) -> Instruction | None:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _end_of_type(rest)
    match = re.match(r"\s*([a-z][\w-]*)\(", rest[end:])
    if match is None:
        return None
    arrays = tuple(
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(rest[:end])
    )
    return Instruction(name.removeprefix("%"), match[1], arrays, rest[:end], rest[end + match.end() :])


def _end_of_type(text: str) -> int:
    """Where the type at the start of `text` ends: at its closing bracket, or at the first blank."""
    if not text.startswith("("):
        return text.find(" ")
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _kind(opcode: str) -> str | None:
    kind = opcode.removesuffix("-start")
    return kind if kind in _COLLECTIVES else None


def _called(instruction: Instruction) -> list[str]:
    called = _CALLED.findall(instruction.rest)
    for names in _BRANCHES.findall(instruction.rest):
        called += [name.strip().removeprefix("%") for name in names.split(",")]
    return called


def _operands(instruction: Instruction) -> list[str]:
    return re.findall(r"%([\w.-]+)", instruction.rest.partition(")")[0])


def _results(root: Instruction) -> list[str]:
    return _operands(root) if root.opcode == "tuple" else [root.name]


def _maker(known: dict[str, Instruction], name: str) -> tuple[str, int]:
    """The instruction that writes what is called `name`, and which of its arrays that is."""
    index = 0
    while (instruction := known[name]).opcode in ("bitcast", "get-tuple-element"):
        if instruction.opcode == "get-tuple-element":
            index = int(_INDEX.findall(instruction.rest)[0])
        name = _operands(instruction)[0]
    return name, index


def _larger_side(instruction: Instruction, sizes: dict[str, int]) -> int:
    given = sum(sizes.get(name, 0) for name in _operands(instruction))
    # The result of a start holds its operands too.
    taken = instruction.bytes - (given if instruction.opcode.endswith("-start") else 0)
    return max(given, taken)
