"""The calls of barriers and index tests as they stand in the sources, compiled and reached or not.

What kernels meet at run time is compared with these, so a new barrier that nothing runs is noticed. It is a reader of
this project's C++, not of any: a function's body begins at a brace that follows a list of parameters. A lambda that
has a name is a helper of the function around it, and `f` of a `class F` is one that was given.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# The emulator looks through these, to the line that calls them; what they call a site is one of their caller's.
PLUMBING = ("csrc/emulator/", "csrc/ptx/", "csrc/device/bounds.cuh", "csrc/device/cuda.h")
COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
ATTRIBUTE = re.compile(r"\b(?:__launch_bounds__|__cluster_dims__|__attribute__|alignas|requires)\s*\(")
SCOPE = re.compile(r"\b(?:namespace|struct|class|union|enum|extern)\b")
CALLED = re.compile(r"\b([A-Za-z_]\w*)\s*(?=\(|<)")
LAMBDA = re.compile(r"\bauto (\w+) = \[")
GIVEN = re.compile(r"\bclass F\b")


@dataclass(frozen=True)
class Function:
    file: str
    """From the repository's root on."""
    name: str
    first_line: int
    last_line: int
    body: str
    """Without comments; begins on first_line."""
    specifiers: str
    """What stands before its name."""

    @cached_property
    def lambdas(self) -> list[tuple[str, range]]:
        """The names and lines of those in its body that have a name."""
        found = []
        for begin in LAMBDA.finditer(self.body):
            depth, at = 0, self.body.index("{", begin.end())
            while True:
                depth += {"{": 1, "}": -1}.get(self.body[at], 0)
                if depth == 0:
                    break
                at += 1
            first, last = (self.first_line + self.body.count("\n", 0, place) for place in (begin.start(), at))
            found.append((begin[1], range(first, last + 1)))
        return found


@dataclass(frozen=True)
class Call:
    """A line that calls a barrier or an index test, or a helper that has some."""

    file: str
    line: int
    function: str
    name: str
    of_lambda: bool
    """Of one that has sites: where the compiler did not inline it, the line is no part of theirs."""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"


class Sources:
    """What can be read off a repository's csrc."""

    def __init__(self, root: Path, folders: tuple[str, ...] = ("csrc",)) -> None:
        """folders: with all the sources, those that may not be looked through included."""
        self.root = root
        paths = {path for folder in folders for path in (root / folder).rglob("*") if path.suffix in SUFFIXES}
        self.texts = {
            path.relative_to(root).as_posix(): code_of(path.read_text(encoding="utf-8")) for path in sorted(paths)
        }
        self.functions = [function for file, text in self.texts.items() for function in functions_of(file, text)]

    @cached_property
    def primitives(self) -> dict[str, str]:
        """What kernels call that is a site: in_bounds and the instructions whose model asks `site_disabled`.

        Name -> the function of the emulator that it comes to.
        """
        inside = [f for f in self.functions if f.file.startswith(PLUMBING)]
        found = {f.name: f.name for f in inside if re.search(r"\bsite_disabled\(", f.body)}
        found.pop("site_disabled", None)
        while True:
            callers = {
                f.name: found[name]
                for f in inside
                for name in CALLED.findall(f.body)
                if name in found and f.name not in found and not f.file.endswith(".cpp")
            }
            if not callers:
                return found
            found |= callers

    @cached_property
    def calls(self) -> list[Call]:
        """Every line of a kernel or a helper that calls a primitive, or a helper that has such a line."""
        on_device = [f for f in self.functions if "__device__" in f.specifiers or "__global__" in f.specifiers]
        ours = [f for f in on_device if not f.file.startswith(PLUMBING)]
        found: dict[tuple[str, int, str, str], bool] = {}  # of a lambda
        with_sites: dict[str, set[str]] = defaultdict(set)  # folder, or function -> names of its helpers
        grows = True
        while grows:
            grows = False
            for f in ours:
                folder, inside = str(Path(f.file).parent), f"{f.file}:{f.name}"
                helpers = self.primitives.keys() | with_sites[folder] | with_sites["csrc/device"]
                lambdas = with_sites[inside] | ({"f"} if GIVEN.search(f.specifiers) else set())
                for number, line in enumerate(f.body.split("\n"), f.first_line):
                    for name in CALLED.findall(line):
                        if name in helpers | lambdas and (f.file, number, f.name, name) not in found:
                            found[f.file, number, f.name, name] = name in lambdas
                            grows = True
                            with_sites[inside] |= {name for name, lines in f.lambdas if number in lines}
                            if "__global__" not in f.specifiers:
                                with_sites[folder].add(f.name)
        return [Call(*call, of_lambda) for call, of_lambda in sorted(found.items())]

    def crowded(self) -> list[str]:
        """Lines whose sites the emulator could not tell apart: the same thing called twice."""
        lines = []
        for call in dict.fromkeys(self.calls):
            kind = self.primitives.get(call.name, call.name)
            text = self.texts[call.file].split("\n")[call.line - 1]
            alike = [name for name in CALLED.findall(text) if self.primitives.get(name, name) == kind]
            if len(alike) > 1:
                lines.append(f"{call.place}: {text.strip()}")
        return sorted(set(lines))

    def key(self, place: str) -> str:
        """What names a line and survives changes elsewhere: file, function and code of `file:line`."""
        file, _, number = place.rpartition(":")
        line = int(number)
        lines = self.texts.get(file, "").split("\n")
        if not 0 < line <= len(lines):
            return place
        code = " ".join(lines[line - 1].split())
        function = next((f for f in self.functions if f.file == file and f.first_line <= line <= f.last_line), None)
        if function is None:
            return f"{file}: {code}"
        before = [" ".join(text.split()) for text in lines[function.first_line - 1 : line - 1]].count(code)
        return f"{file}, {function.name}: {code}" + (f" ({before + 1})" if before else "")


SUFFIXES = (".cu", ".cuh", ".h", ".cpp")


def code_of(text: str) -> str:
    """The text without comments, strings' contents and preprocessor lines; every line stays where it is."""

    def blank(found: re.Match[str]) -> str:
        return '""' if found[0].startswith('"') else "\n" * found[0].count("\n") or " "

    text = COMMENT_OR_STRING.sub(blank, text)
    text = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda found: "\n" * found[0].count("\n"), text, flags=re.MULTILINE)
    return "\n".join(line.rstrip() for line in text.split("\n"))


def functions_of(file: str, code: str) -> list[Function]:
    """The functions that a file defines: those of namespaces, and the members of classes."""
    found = []
    depth_of_function: int | None = None
    scopes: list[bool] = []  # of the braces that are open: whether it is one of a namespace or a class
    begin = since = 0
    name = specifiers = ""
    for at, character in enumerate(code):
        if character == "{":
            head = without_attributes(code[since:at])
            if depth_of_function is None and all(scopes):
                named = re.search(r"([A-Za-z_]\w*|operator\S+)\s*\(", head)
                is_scope = SCOPE.search(re.sub(r"template\s*<[^{]*?>\s*(?=\w)", "", head)) and not named
                if named and not head.rstrip().endswith("="):
                    depth_of_function, begin, name, specifiers = len(scopes), at, named[1], head[: named.start()]
                scopes.append(bool(is_scope))
            else:
                scopes.append(False)
            since = at + 1
        elif character == "}":
            if scopes:
                scopes.pop()
            if depth_of_function == len(scopes):
                depth_of_function = None
                first = code.count("\n", 0, begin) + 1
                body = code[begin : at + 1]
                found.append(Function(file, name, first, first + body.count("\n"), body, specifiers))
            since = at + 1
        elif character == ";" and depth_of_function is None:
            since = at + 1
    return found


def without_attributes(head: str) -> str:
    """Without those that have parentheses of their own."""
    while attribute := ATTRIBUTE.search(head):
        depth, end = 1, attribute.end()
        while depth and end < len(head):
            depth += {"(": 1, ")": -1}.get(head[end], 0)
            end += 1
        head = head[: attribute.start()] + head[end:]
    return head
