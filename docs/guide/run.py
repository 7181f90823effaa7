"""Run a chapter of the guide: every ```python block in order, in one namespace, in a temporary folder.

    python docs/guide/run.py 04            one chapter, its output shown as it comes
    python -i docs/guide/run.py 04         the same, and then a prompt with everything the chapter defined

A ```text block right after a ```python block is what that block must print. Numbers with a decimal point may
differ by one in their last digit, because processors round sums differently; everything else is compared exactly.
A ```text example is the outcome of a training run, of which only the words are compared: the rounding adds up there,
and what must hold of the numbers is asserted in the code. A ```cuda block is written to the file that its first line
names, for the blocks after it to compile.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GUIDE = Path(__file__).resolve().parent
_FENCE = re.compile(r"^```(\w*)( example)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"// ([\w-]+\.cuh?)\b")
_DECIMAL = re.compile(r"-?\d+\.\d+")
_NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?")


class ChapterError(Exception):
    """A block printed something else than the text says."""


@dataclass(frozen=True)
class Block:
    """One ```python or ```cuda block: its code, the line it begins at, and what it prints (None: not stated)."""

    code: str
    line: int
    printed: str | None = None
    example: bool = False
    """Only the words of `printed` must be as they are, not the numbers."""
    file: str | None = None
    """Of a ```cuda block: where it is written."""


def chapters() -> list[Path]:
    """The chapters, in order."""
    return sorted(GUIDE.glob("[0-9][0-9]-*.md"))


def blocks(text: str) -> list[Block]:
    """What runs of a chapter. Raises ChapterError for an output that follows no code, and a file without a name."""
    found: list[Block] = []
    end = -1  # where the last python block ended
    for fence in _FENCE.finditer(text):
        language, example, content = fence[1], bool(fence[2]), fence[3]
        line = text.count("\n", 0, fence.start(3)) + 1
        if language == "python":
            found.append(Block(content, line))
            end = fence.end()
        elif language == "cuda":
            name = _FILE.match(content)
            if name is None:
                raise ChapterError(f"line {line}: a cuda block begins with // and the name of its file")
            found.append(Block(content, line, file=name[1]))
            end = -1
        elif language == "text":
            if end < 0 or text[end : fence.start()].strip():
                raise ChapterError(f"line {line}: a text block is the output of the python block right before it")
            found[-1] = Block(found[-1].code, found[-1].line, content, example)
            end = -1
    return found


def difference(printed: str, expected: str, example: bool = False) -> str | None:
    """Where the two differ, as a message; None where they agree as the rule at the top says."""
    mask = _NUMBER if example else _DECIMAL
    a, b = (text.strip("\n").splitlines() for text in (printed, expected))
    for x, y in zip(a, b, strict=False):
        x, y = " ".join(x.split()), " ".join(y.split())
        same = mask.sub("#", x) == mask.sub("#", y)
        if not same or not (example or all(map(_close, _DECIMAL.findall(x), _DECIMAL.findall(y)))):
            return f"printed   {x}\n  expected  {y}"
    if len(a) != len(b):
        return f"printed {len(a)} lines, expected {len(b)}"
    return None


def _close(a: str, b: str) -> bool:
    digits = len(b.split(".")[1])
    return len(a.split(".")[1]) == digits and abs(float(a) - float(b)) < 1.5 * 10**-digits


def run(chapter: Path, echo: Callable[[str], Any] = lambda text: None) -> dict[str, Any]:
    """Run a chapter in the present folder and return its namespace; `echo` is given what each block printed.

    Raises ChapterError for an unexpected output, and whatever a block raises, with the chapter's line numbers.
    """
    namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(chapter)}
    for block in blocks(chapter.read_text(encoding="utf-8")):
        if block.file is not None:
            Path(block.file).write_text(block.code, encoding="utf-8")
            continue
        code = compile("\n" * (block.line - 1) + block.code, str(chapter), "exec")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(code, namespace)
        echo(output.getvalue())
        if block.printed is not None and (problem := difference(output.getvalue(), block.printed, block.example)):
            raise ChapterError(f"{chapter.name}, the block at line {block.line}:\n  {problem}")
    return namespace


def main(arguments: list[str]) -> dict[str, Any]:
    named = [path for path in chapters() if len(arguments) == 1 and path.name.startswith(arguments[0])]
    if len(named) != 1:
        sys.exit(f"usage: run.py CHAPTER, one of {', '.join(path.name[:2] for path in chapters())}")
    sys.path.insert(0, str(GUIDE.parents[1]))  # the package, installed or not
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return run(named[0], echo=lambda text: print(text, end="", flush=True))
        except ChapterError as error:
            sys.exit(f"run.py: {error}")
        finally:
            os.chdir(GUIDE)


if __name__ == "__main__":
    globals().update(main(sys.argv[1:]))
