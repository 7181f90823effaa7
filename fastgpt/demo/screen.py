"""The demo's terminal: aligned lines, a live bar, highlighted code and bar charts; plain lines where there is none.

A reader that goes away (`make demo | head`) ends the output, not the run.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Optional, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn
from rich.syntax import Syntax
from rich.text import Text

from ..units import duration, short_number

WIDTH = 96
MARGIN = 11  # columns of a section's name
PLAIN_SECONDS = 15.0  # between lines of progress where nothing can be redrawn
OURS, MUTED, HEAD = "bold cyan", "bright_black", "bold"


class LastingStream:
    """A text stream whose reader may go away, and which need not know every character."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding or "ascii"
            return self.stream.write(text.encode(encoding, "replace").decode(encoding))
        except OSError:  # a closed pipe, a terminal that was hung up
            return self._silence()

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._silence()

    def _silence(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        self.stream = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
        return 0


class Screen:
    def __init__(self, stream: Optional[TextIO] = None):
        stream = stream or sys.stdout
        self.console = Console(file=LastingStream(stream), highlight=False, soft_wrap=False)  # type: ignore[arg-type]
        self.live_output = self.console.is_terminal
        self.console.width = min(self.console.width, WIDTH) if self.live_output else WIDTH

    def print(self, *parts: Any, style: str = "") -> None:
        self.console.print(*parts, style=style)

    def line(self, name: str, text: str | Text = "") -> None:
        """`name` in the margin, `text` beside it, wrapped under itself."""
        text = Text(text) if isinstance(text, str) else text
        for row in text.wrap(self.console, self.console.width - MARGIN) or [Text()]:
            row.rstrip()
            self.console.print(Text.assemble((f"{name:<{MARGIN}}" if row or name else "", HEAD), row))
            name = ""

    def command(self, name: str, text: str) -> None:
        """A line to be copied whole: never wrapped by us."""
        self.console.print(Text.assemble((f"{name:<{MARGIN}}", HEAD), text), soft_wrap=True)

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """A spinner on a terminal while something short goes on."""
        if self.live_output:
            with self.console.status(Text(what, style=MUTED), spinner="dots"):
                yield
        else:
            yield

    def code(self, source: str, lines: int, lexer: str) -> None:
        """The first `lines` lines of a completion, highlighted, with a rule at their left."""
        shown = [line.rstrip() for line in source.expandtabs(4).rstrip().split("\n")]
        shown = [line for n, line in enumerate(shown) if line or (n and shown[n - 1])]  # one blank line at a time
        text = "\n".join(shown[:lines])
        highlighted = Text(text)
        if self.live_output:
            highlighted = Syntax(text, lexer, theme="ansi_dark", background_color="default").highlight(text)
            highlighted.rstrip()
        rows = list(highlighted.split("\n")) + [Text("...", style=MUTED)] * (len(shown) > lines)
        for row in rows:
            row.truncate(self.console.width - MARGIN - 2, overflow="ellipsis")
            self.console.print(Text.assemble((" " * MARGIN + "│", MUTED), " " if row else "", row), no_wrap=True)

    def ladder(self, rungs: Sequence[tuple[str, float, bool]]) -> None:
        """(name, value, whether it is ours), drawn as bars from the worst to the best."""
        rungs = sorted(rungs, key=lambda rung: -rung[1])
        longest = max(len(name) for name, _, _ in rungs)
        room = self.console.width - MARGIN - longest - 8
        for name, value, ours in rungs:
            style = OURS if ours else MUTED
            bar = bar_of(value / rungs[0][1] * room)
            self.console.print(
                Text.assemble(
                    " " * MARGIN,
                    (f"{name:<{longest}}", OURS if ours else ""),
                    (f"  {value:4.2f}  ", HEAD),
                    (bar, style),
                ),
                no_wrap=True,
                overflow="crop",
            )


def bar_of(length: float) -> str:
    """Block characters, exact to an eighth of a column."""
    whole, part = divmod(max(0, round(length * 8)), 8)
    return "█" * whole + ("▏▎▍▌▋▊▉"[part - 1] if part else "")


class TrainingBar:
    """Step, loss, tokens/s and the time left; redrawn on a terminal, a line every PLAIN_SECONDS elsewhere."""

    def __init__(self, screen: Screen, steps: int, batch_tokens: int):
        self.screen, self.steps, self.batch_tokens = screen, steps, batch_tokens
        self.speed: Optional[float] = None
        self.last_line = time.monotonic()
        self.progress = None
        if screen.live_output:
            self.progress = Progress(
                TextColumn(" " * (MARGIN - 1)),
                BarColumn(bar_width=24, complete_style="cyan", finished_style="cyan"),
                TextColumn("{task.fields[text]}", markup=False),
                console=screen.console,
                refresh_per_second=5,
                transient=True,
            )
            self.task = self.progress.add_task("", total=steps, text="")
            self.progress.start()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        self.speed = tokens_per_second if self.speed is None else 0.95 * self.speed + 0.05 * tokens_per_second
        left = duration((self.steps - step) * self.batch_tokens / self.speed)
        text = f"step {step:,}/{self.steps:,}  loss {loss:.2f}  {short_number(self.speed)} tokens/s  {left} left"
        if self.progress is not None:
            self.progress.update(self.task, completed=step, text=text)
        elif time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            self.screen.line("", text)

    def note(self, text: str) -> None:
        """Replaces the figures for a moment, while something else than training goes on."""
        if self.progress is not None:
            self.progress.update(self.task, text=text, refresh=True)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class Redrawn:
    """Lines that are drawn over until they are final; only the final ones where nothing can be redrawn."""

    def __init__(self, screen: Screen):
        self.screen = screen
        self.live = Live(console=screen.console, auto_refresh=False, transient=True) if screen.live_output else None
        self.last: Sequence[Text] = ()

    def __enter__(self) -> Redrawn:
        if self.live is not None:
            self.live.start()
        return self

    def show(self, lines: Sequence[Text]) -> None:
        self.last = lines
        if self.live is not None:
            self.live.update(Padding(Group(*lines), (0, 0, 0, MARGIN)), refresh=True)

    def __exit__(self, *error: Any) -> None:
        if self.live is not None:
            self.live.stop()
        for line in self.last:
            self.screen.line("", line)
