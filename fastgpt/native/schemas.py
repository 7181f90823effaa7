"""What each compiled op takes and returns, read from the pages in `fastgpt/ops` without importing them or torch.

A page declares its entries in one literal, `SCHEMAS = {"swiglu_forward": "(Tensor gate_up) -> Tensor", ...}`. The
builder compiles a digest of all of them into the libraries: arguments reach C++ unchecked, so a library built for
other schemas would compute garbage, and the loader refuses it.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path

OPS_FOLDER = Path(__file__).resolve().parent.parent / "ops"


def read_pages(folder: Path = OPS_FOLDER) -> dict[str, dict[str, str]]:
    """The pages in `folder` that declare entries: page -> entry, without a namespace -> schema, without a name."""
    found: dict[str, dict[str, str]] = {}
    for page in sorted(folder.glob("*.py")):
        text = page.read_text(encoding="utf-8")
        if "SCHEMAS" not in text:
            continue
        for node in ast.parse(text, str(page)).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["SCHEMAS"]:
                found[page.stem] = ast.literal_eval(node.value)
    return found


def read_schemas(folder: Path = OPS_FOLDER) -> dict[str, str]:
    """Every entry that the pages in `folder` declare: its name, without a namespace, and its schema, without a name."""
    return {entry: schema for entries in read_pages(folder).values() for entry, schema in entries.items()}


def schema_digest(folder: Path = OPS_FOLDER) -> str:
    """One short word for all schemas; it changes with any of them."""
    return hashlib.sha256(json.dumps(read_schemas(folder), sort_keys=True).encode()).hexdigest()[:16]
