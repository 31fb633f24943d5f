"""What a progress shows: nothing, plain lines, or live bars; and how it says counts and times."""

import contextlib
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any, TextIO

from jaxtax.tell import tell

if TYPE_CHECKING:
    from jaxtax.progress import Progress


def duration(seconds: float) -> str:
    """Seconds in words of a fitting size: "8 s", "3 min 20 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _facts(node: "Progress") -> str:
    """Count and fields of one stage, as text."""
    in_weights = node.parent is None and not node.fields  # a count of those says nothing
    words = (
        [] if node.total == 1.0 or in_weights else [f"{_number(int(node.done))}/{_number(int(node.total))}"]
    )
    for key, value in node.fields.items():
        unit, per, _ = key.partition("_per_second")
        words.append(f"{_number(value)} {unit}/s" if per else f"{key.replace('_', ' ')} {_number(value)}")
    return ", ".join(words)


def _left(node: "Progress") -> str:
    """Time left of one stage, as text; empty when it is not known or over."""
    left = node.seconds_left
    return f"{duration(left)} left" if left is not None and node.share < 1.0 else ""


def _though_gone() -> contextlib.suppress:
    """A terminal that was closed ends no work."""
    return contextlib.suppress(OSError, ValueError)


class Nothing:
    """What a progress needs of whatever shows it; this one shows nothing."""

    def __init__(self, root: "Progress", stream: TextIO | None, seconds_between: float) -> None:
        self._root = root
        self._stream = stream
        self._seconds_between = seconds_between

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def opened(self, node: "Progress") -> None:
        pass

    def changed(self, node: "Progress") -> None:
        pass

    def closed(self, node: "Progress") -> None:
        pass

    def say(self, text: str) -> None:
        pass


class Lines(Nothing):
    """Plain lines: when a stage begins and ends, and every few seconds in between."""

    _last = float("-inf")

    def say(self, text: str) -> None:
        tell(f"{datetime.now():%H:%M:%S} {text}", self._stream)

    def opened(self, node: "Progress") -> None:
        self._last = time.monotonic()
        if node.parent is self._root:
            self.say(f"{self._root.name} {self._root.share:.0%} | {node.name}")

    def changed(self, node: "Progress") -> None:
        if time.monotonic() - self._last < self._seconds_between:
            return
        self._last = time.monotonic()
        whole = f"{self._root.name} {self._root.share:.0%}"
        facts = ", ".join(filter(None, [_facts(node), _left(node)]))
        if node is self._root:
            self.say(f"{whole} {facts}")
            return
        if (left := _left(self._root)) and node.parent is not self._root:  # else the stage's own says it
            whole += f", {left}"
        self.say(f"{whole} | {node.label} {facts}")

    def closed(self, node: "Progress") -> None:
        if node.parent is self._root:
            took = duration(time.monotonic() - node.started)
            self.say(f"{self._root.name} {self._root.share:.0%} | {node.name} done in {took}")


class Live(Nothing):
    """Bars that are redrawn four times a second; the imports wait until a terminal asks for them."""

    def start(self) -> None:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._stream, markup=False, highlight=False)
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=4)
        with _though_gone():
            self._live.start()

    def stop(self) -> None:
        with _though_gone():
            self._live.stop()

    def say(self, text: str) -> None:
        with _though_gone():
            self._live.console.print(text)

    def _draw(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        lines = Table.grid(padding=(0, 1))
        for _ in range(4):
            lines.add_column(no_wrap=True, overflow="ellipsis")
        innermost = self._root.innermost
        for node in [self._root] if innermost is self._root else [self._root, innermost]:
            bar = ProgressBar(total=1.0, completed=node.share, width=12)
            lines.add_row(node.label, bar, f"{node.share:.0%}", _left(node))
        return Group(lines, _facts(innermost))
