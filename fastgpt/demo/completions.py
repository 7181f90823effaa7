"""Held-out function signatures, what the model makes of them, and whether that is Python of its own.

A completion is good if signature and body parse with `ast`, the body does something (more than `pass`, `...`, a
bare name or number, or a docstring), and no run of COPY_LENGTH characters of it is in the training text.
"""

from __future__ import annotations

import ast
import hashlib
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .corpus import Document

if TYPE_CHECKING:
    from ..model import GPT
    from ..tokenizer import Tokenizer

COPY_LENGTH = 50
MAX_NEW_TOKENS = 128
TEMPERATURE = 0.4  # greedy decoding falls into loops; higher ones into typing errors
SEED = 1


@dataclass(frozen=True)
class Verdict:
    """How completions were judged; each count is of `total`."""

    total: int
    parses: int
    does_something: int
    """Parses and does something."""
    good: int
    """Parses, does something, and is not copied."""


def signatures(documents: Sequence[Document], training: str = "") -> list[str]:
    """The function signatures (`def f(x):`) in Python sources, in the order of their hashes, none twice.

    Functions and methods alike, as they are indented, one line each, decorators left out; none that is a line of
    `training` too.
    """
    found: dict[str, None] = {}
    for document in documents:
        try:
            tree = ast.parse(document.text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        lines = document.text.splitlines()
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.body[0].lineno > node.lineno:
                line = lines[node.lineno - 1].rstrip()
                if line.endswith(":") and len(line) <= 88 and _parses(line.strip() + "\n    pass\n"):
                    found[line] = None
    seen = {line.strip() for line in training.splitlines()}
    unseen = (line for line in found if line.strip() not in seen)
    return sorted(unseen, key=lambda line: hashlib.sha256(line.encode()).digest())


def to_watch(lines: Sequence[str]) -> str | None:
    """The one that is shown while the model learns: a public function (no method) with two or three arguments."""
    for line in lines:
        function: Any = ast.parse(line.strip() + "\n    pass\n").body[0]
        arguments = function.args
        plain = not (line[0].isspace() or function.name.startswith("_") or arguments.vararg or arguments.kwarg)
        if plain and 2 <= len(arguments.args) <= 3 and 16 <= len(line) <= 40:
            return line
    return lines[0] if lines else None


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def function_body(signature: str, text: str, *, finished: bool) -> str:
    """The lines of a completion that belong to the function: up to the first that is indented no further than the
    signature.

    Where none does and the model did not end the text itself (`finished` false), the last line may have been
    cut off in the middle and is left out.
    """
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        if line.strip() and _indent(line) <= _indent(signature):
            return "".join(lines[:number])
    if not finished and lines and not lines[-1].endswith("\n"):
        lines.pop()
    return "".join(lines)


def _indent(line: str) -> int:
    line = line.expandtabs()
    return len(line) - len(line.lstrip())


def does_something(source: str) -> bool:
    """True if the source parses as one function whose body is more than a docstring, `pass` and bare values."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return False
    idle = (ast.Constant, ast.Name)
    return any(
        not isinstance(node, ast.Pass) and not (isinstance(node, ast.Expr) and isinstance(node.value, idle))
        for node in tree.body[0].body
    )


def copied(texts: Sequence[str], training: str, length: int = COPY_LENGTH) -> list[bool]:
    """For each text, whether `length` characters of it in a row are somewhere in `training`.

    A run of that length in `training` covers one of the pieces that begin at multiples of half of it. So the
    pieces are looked up among those of the texts, and only where one is found the surroundings are compared.
    """
    piece = (length + 1) // 2
    places: dict[str, list[tuple[int, int]]] = {}  # piece -> (text, where in it)
    for number, text in enumerate(texts):
        if len(text) >= length:
            for at in range(len(text) - piece + 1):
                places.setdefault(text[at : at + piece], []).append((number, at))
    result = [False] * len(texts)
    for start in range(0, len(training) - piece + 1, piece):
        for number, at in places.get(training[start : start + piece], ()):
            if not result[number]:
                text = texts[number]
                before = _common(training[max(0, start - length) : start][::-1], text[max(0, at - length) : at][::-1])
                after = _common(training[start : start + length], text[at : at + length])
                result[number] = before + after >= length
    return result


def _common(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def judge(prompts: Sequence[str], bodies: Sequence[str], training: str) -> Verdict:
    """`bodies[i]` is what `function_body` kept of the completion of `prompts[i]`."""
    sources = [textwrap.dedent(f"{prompt}\n{body}") for prompt, body in zip(prompts, bodies, strict=True)]
    parses = [bool(body.strip()) and _parses(source) for source, body in zip(sources, bodies, strict=True)]
    works = [p and does_something(source) for p, source in zip(parses, sources, strict=True)]
    own = [not copy for copy in copied(bodies, training)]
    return Verdict(len(prompts), sum(parses), sum(works), sum(w and o for w, o in zip(works, own, strict=True)))


def complete(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = TEMPERATURE,
    top_k: int | None = None,
) -> list[tuple[str, bool]]:
    """(text after the prompt, whether the model ended it with `<|endoftext|>`) for each prompt.

    All prompts go through the model as one batch; the draws are seeded, so the same weights write the same text.
    """
    import torch

    from ..generate import generate

    if not prompts:
        return []
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    room = model.config.block_size - max_new_tokens
    rows = [row[-max(1, room) :] for row in rows]
    longest = max(map(len, rows))
    idx = torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        idx[number, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows])
    generator = torch.Generator(model.device).manual_seed(SEED)
    tokens = generate(
        model,
        idx.to(model.device),
        max_new_tokens,
        lengths=lengths,
        temperature=temperature,
        top_k=top_k,
        generator=generator,
        stop_ids=[tokenizer.eot_id],
    ).tolist()
    completions = []
    for row, ids in zip(rows, tokens, strict=True):
        new = ids[len(row) : len(row) + max_new_tokens]
        ended = tokenizer.eot_id in new
        new = new[: new.index(tokenizer.eot_id)] if ended else new
        completions.append((tokenizer.decode(new), ended))
    return completions
