"""Signals that end a command: SIGTERM does what a Ctrl-C does, in one line and with an exit code of its own."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Whoever cleans up after a Ctrl-C cleans up after it too."""


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """What a shell gives for a process that the signal has ended."""
    return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)


def answer(interrupt: KeyboardInterrupt) -> int:
    """Say on stderr what came, and what it left if that is known; return the exit code."""
    word = "terminated" if isinstance(interrupt, Terminated) else "interrupted"
    begin = "\n" if sys.stderr.isatty() else ""  # after what the terminal shows of the key
    with contextlib.suppress(OSError, ValueError):  # whoever read it may have gone with the same key
        print(f"{begin}fastgpt: {'; '.join([word, *map(str, interrupt.args)])}", file=sys.stderr, flush=True)
    return exit_code(interrupt)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


_OURS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}


def _held() -> list[signal.Signals]:
    """The signals that raise an exception in this thread."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number, handler in _OURS.items() if signal.getsignal(number) is handler]


def catch_sigterm() -> None:
    """From here on it raises Terminated, unless somebody else has an answer to it."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def let_go() -> None:
    """All is done and written: from now on a signal only ends Python's own clearing up, without a traceback."""
    for number in _held():
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def whole_imports() -> Iterator[None]:
    """A signal comes when the imports inside are done: what one of them says when it is cut short is its own affair."""
    came: list[int] = []
    held = _held()
    for number in held:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number in held:
            signal.signal(number, _OURS[number])
    if came:
        raise Terminated if came[0] == signal.SIGTERM else KeyboardInterrupt
