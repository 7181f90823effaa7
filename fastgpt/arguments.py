"""From configuration dataclasses to a command line: tyro parses and writes the help, refusals take one line.

A flag is spelled as its field, `--model.n_embd 256`, and hyphens do as well. Every flag and value is checked
here first, against the same table that tyro's parser is generated from, so that a refusal names the flag, what
it expected and what was probably meant, whatever the version of tyro.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .config import ConfigError, check_field, expected
from .errors import UserError

HELP = {"-h", "--help"}
TRUE_OR_FALSE = {"true": True, "false": False}


@dataclass(frozen=True)
class Positional:
    """The words of a command line that belong to no flag."""

    metavar: str
    help: str
    many: bool = False  # any number of them, none included; otherwise exactly one

    @property
    def shown(self) -> str:
        """In the help: RUN..., where there may be many."""
        return f"{self.metavar}..." if self.many else self.metavar


@dataclass(frozen=True)
class Flag:
    """One field of a configuration, as an option."""

    name: str  # --section.field
    field: dataclasses.Field
    hint: Any

    @property
    def takes_many(self) -> bool:
        return typing.get_origin(self.hint) is tuple

    @property
    def arms(self) -> tuple:
        """The types that a value may have: those of a union, or the one."""
        return typing.get_args(self.hint) if _is_union(self.hint) else (self.hint,)

    @property
    def is_switch(self) -> bool:
        return self.hint is bool

    @property
    def negated(self) -> str:
        """The spelling that sets a switch to false: --section.no_field."""
        section, dot, field = self.name[2:].rpartition(".")
        return f"--{section}{dot}no_{field}"

    def check(self, text: str) -> None:
        """Raises ConfigError if `text` is no value of this field."""
        if text == "None" and _is_union(self.hint):
            return
        value: Any = text
        if bool in self.arms:
            value = TRUE_OR_FALSE.get(text.lower(), text)
        for number in {int, float} & set(self.arms):
            with contextlib.suppress(ValueError):
                value = number(text)
        if self.takes_many:
            value = (value,)
        check_field(self.field, self.hint, value, self.name)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _nested(hint: Any) -> type | None:
    """The configuration class inside a type (`X` or `Optional[X]`), if there is one."""
    arms = typing.get_args(hint) if _is_union(hint) else (hint,)
    return next((a for a in arms if dataclasses.is_dataclass(a)), None)


def flags(cls: type, prefix: str = "--") -> dict[str, Flag]:
    """Every option of a configuration class by name, nested classes included."""
    hints = typing.get_type_hints(cls)
    found: dict[str, Flag] = {}
    for f in dataclasses.fields(cls):
        nested = _nested(hints[f.name])
        if nested is not None:
            found |= flags(nested, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = Flag(prefix + f.name, f, hints[f.name])
    return found


def _unknown(spelled: str, known: Sequence[str], prog: str) -> UserError:
    name = "--" + spelled.lstrip("-").replace("-", "_")
    last = {flag: flag.rpartition(".")[2].lstrip("-") for flag in known}
    word = name.rpartition(".")[2].lstrip("-")
    near = [flag for flag in known if last[flag] == word]  # a forgotten or mistaken section
    near = near or difflib.get_close_matches(name, known, n=1)
    close = difflib.get_close_matches(word, set(last.values()), n=1)
    near = near or [flag for flag in known if last[flag] in close]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else f"`{prog} --help` lists the options"
    return UserError(f"{prog} has no option {spelled}; {hint}")


def _is_flag(token: str) -> bool:
    return token.startswith("--") or bool(re.match(r"-[A-Za-z]", token))


def check(argv: Sequence[str], known: dict[str, Flag], prog: str) -> list[tuple[Flag | None, str]]:
    """The command line as (flag, value) pairs, (None, word) for the words that belong to no flag.

    Raises UserError for an unknown flag or a missing value, ConfigError for a value of the wrong type or range.
    """
    spellings = known | {f.negated: f for f in known.values() if f.is_switch}
    pairs: list[tuple[Flag | None, str]] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token == "--":
            pairs += [(None, word) for word in rest]
            break
        if not _is_flag(token):
            pairs.append((None, token))
            continue
        spelled, equals, value = token.partition("=")
        name = "--" + spelled.lstrip("-").replace("-", "_")
        if not spelled.startswith("--") or name not in spellings:
            raise _unknown(spelled, list(spellings), prog)
        flag = spellings[name]
        if flag.is_switch:
            if not equals:
                value = rest.pop(0) if rest and rest[0].lower() in TRUE_OR_FALSE else "true"
            flag.check(value)
            on = TRUE_OR_FALSE[value.lower()] is (name == flag.name)
            pairs.append((flag, "true" if on else "false"))
            continue
        values = [value] if equals else []
        if not equals:
            while rest and not rest[0].startswith("--") and (flag.takes_many or not values):
                values.append(rest.pop(0))
            if not values:
                raise UserError(f"{flag.name} needs a value: expected {expected(flag.field, flag.hint)}")
        for value in values:
            flag.check(value)
        pairs += [(flag, value) for value in values]
    return pairs


def _tokens(pairs: list[tuple[Flag | None, str]]) -> list[str]:
    """The command line again, in the one spelling that tyro cannot misread."""
    many: dict[str, list[str]] = {}
    tokens: list[str] = []
    for flag, value in pairs:
        if flag is None:
            continue
        if flag.is_switch:
            tokens.append(flag.name if value == "true" else flag.negated)
        elif flag.takes_many:
            many.setdefault(flag.name, []).append(value)
        else:
            value = value.capitalize() if bool in flag.arms else value  # an optional switch: True, False, None
            tokens.append(f"{flag.name}={value}")
    for name, values in many.items():
        tokens += [name, *values]
    return tokens


def _opened(config: Any) -> Any:
    """`config` with every absent nested table present at its defaults, so that tyro generates its flags."""
    changes = {}
    for f, hint in zip(dataclasses.fields(config), typing.get_type_hints(type(config)).values(), strict=True):
        nested, value = _nested(hint), getattr(config, f.name)
        if nested is not None:
            changes[f.name] = nested() if value is None else _opened(value)
    return dataclasses.replace(config, **changes)


def _closed(opened: Any, base: Any, mentioned: set[str], prefix: str = "--") -> Any:
    """Undoes `_opened` where no flag of the nested table was given."""
    changes = {}
    for f, hint in zip(dataclasses.fields(base), typing.get_type_hints(type(base)).values(), strict=True):
        if _nested(hint) is None:
            continue
        inner = f"{prefix}{f.name}."
        if getattr(base, f.name) is not None:
            changes[f.name] = _closed(getattr(opened, f.name), getattr(base, f.name), mentioned, inner)
        elif not any(name.startswith(inner) for name in mentioned):
            changes[f.name] = None
    return dataclasses.replace(opened, **changes)


def _sections(cls: type, prefix: str = "--") -> dict[str, str]:
    """Where each nested configuration class is spelled: {"ModelConfig": "--model."}."""
    found = {cls.__name__: prefix}
    for name, hint in typing.get_type_hints(cls).items():
        nested = _nested(hint)
        if nested is not None:
            found |= _sections(nested, f"{prefix}{name}.")
    return found


def _named_by_flags(message: str, bases: Sequence[Any]) -> str:
    """`ModelConfig.n_embd = 3: ...` as the user spells it, `--model.n_embd = 3: ...`."""
    name, dot, rest = message.partition(".")
    return next((s[name] + rest for s in map(_sections, map(type, bases)) if dot and name in s), message)


def _reason(error: BaseException, printed: str) -> str:
    """Why tyro refused: our own error, if that is behind it, else what tyro printed, without its box."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConfigError):
            return str(cause)
        cause = cause.__context__
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    return " ".join(re.sub(r"[─-╿]", " ", text).split()) or "the command line could not be read"


def given(argv: Sequence[str], classes: Sequence[type], prog: str) -> dict[str, str]:
    """The flags on a command line with their (last) values, before anything is built from them. Raises as `parse`."""
    known = {name: flag for cls in classes for name, flag in flags(cls).items()}
    return {flag.name: value for flag, value in check(argv, known, prog) if flag is not None}


def parse(
    argv: Sequence[str], bases: Sequence[Any], *, prog: str, description: str, positional: Positional | None = None
) -> tuple[list[Any], list[str]]:
    """The configurations `bases` with the fields changed that the command line names; and the words of no flag.

    Raises UserError or ConfigError, of one line, for what it refuses; SystemExit(0) after printing the help.
    """
    if HELP & set(argv):
        _tyro(["--help"], bases, prog, description, positional)
    known = {name: flag for base in bases for name, flag in flags(type(base)).items()}
    pairs = check(argv, known, prog)
    words = [word for flag, word in pairs if flag is None]
    most = 0 if positional is None else len(words) if positional.many else 1
    if len(words) > most:
        raise UserError(f"{prog} does not know what {words[most]!r} is for; `{prog} --help` lists the options")
    if positional is not None and not positional.many and not words:
        raise UserError(f"{prog} needs {positional.metavar}: {positional.help}")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            opened = _tyro(_tokens(pairs), bases, prog, description)
    except ConfigError as error:
        raise ConfigError(_named_by_flags(str(error), bases)) from None
    except SystemExit as exit:
        raise UserError(_named_by_flags(_reason(exit, printed.getvalue()), bases)) from None
    mentioned = {flag.name for flag, _ in pairs if flag is not None}
    return [_closed(a, b, mentioned) for a, b in zip(opened, bases, strict=True)], words


def _tyro(
    tokens: list[str], bases: Sequence[Any], prog: str, description: str, positional: Positional | None = None
) -> list[Any]:
    import tyro

    shape: list[tuple] = []
    if positional is not None:  # for the help; `parse` takes the words itself
        about = tyro.conf.arg(metavar=positional.shown, help=positional.help, help_behavior_hint="")
        shape.append(("words", typing.Annotated[tyro.conf.Positional[tuple[str, ...]], about], ()))
    for i, base in enumerate(bases):
        shape.append((f"part{i}", typing.Annotated[type(base), tyro.conf.arg(name="")], _opened(base)))
    form = tyro.cli(
        dataclasses.make_dataclass("Form", shape),
        prog=prog,
        description=description,
        args=tokens,
        use_underscores=True,
        config=(tyro.conf.AvoidSubcommands,),
    )
    return [getattr(form, f"part{i}") for i in range(len(bases))]
