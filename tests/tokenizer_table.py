"""Bytes per token by script: what it is measured on, and the table in docs/tokenizer.md.

`python -m tests.tokenizer_table` writes the table anew. The text is shipped, so it comes out the same
everywhere: the Universal Declaration of Human Rights in nine languages (articles 2 and 3 are trained
on, article 1 is measured) and some source code (its end is measured).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fastgpt.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "tokenizer.md"
VOCAB_SIZE = 1280
BEGIN, END = "<!-- table: python -m tests.tokenizer_table -->\n", "<!-- end of table -->\n"


def texts() -> tuple[list[str], dict[str, str]]:
    """The texts to train on, and by name those to measure."""
    folder = Path(__file__).parent / "text"
    declaration = json.loads((folder / "declaration.json").read_text(encoding="utf-8"))
    seen, held_out = (folder / "code.txt").read_text(encoding="utf-8").split("%%%% held out\n")
    train = [f"{article}\n" for articles in declaration.values() for article in articles[1:]]
    measured = {name: f"{articles[0]}\n" for name, articles in declaration.items()}
    measured["Source code (Python)"] = held_out
    measured["Indentation (4 to 16 spaces)"] = "".join("\n" + " " * (4 * (i % 4 + 1)) for i in range(64))
    measured["Blank lines"] = "\n\n" * 64
    return [*train, seen], measured


def trained() -> Tokenizer:
    return Tokenizer.train(texts=texts()[0], vocab_size=VOCAB_SIZE)


def bytes_per_token(tokenizer: Tokenizer, samples: Mapping[str, str]) -> dict[str, float]:
    """UTF-8 bytes of each text over the tokens it takes."""
    return {name: len(text.encode()) / len(tokenizer.encode(text)) for name, text in samples.items()}


def table(tokenizer: Tokenizer) -> str:
    """The rows of docs/tokenizer.md, as Markdown."""
    samples = texts()[1]
    lines = ["| text | bytes per character | bytes per token |", "| --- | ---: | ---: |"]
    for name, value in bytes_per_token(tokenizer, samples).items():
        per_character = len(samples[name].encode()) / len(samples[name])
        lines.append(f"| {name} | {per_character:.2f} | {value:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table(trained()) + END + rest.split(END)[1], encoding="utf-8")
