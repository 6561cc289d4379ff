"""From words to a command's call, and its help: tyro underneath, with short placeholders, examples and one-line errors.

A command is a function: its signature says the flags, its docstring what they mean. The docstring's paragraph that
begins with "For example" holds commands in backticks; help shows them at its end.
"""

from __future__ import annotations

import functools
import inspect
import io
import itertools
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, get_args, get_origin, get_type_hints

import tyro

from robustfpd.errors import InputError, unknown_name

Command = Callable[..., Any]

PLACEHOLDERS: dict[Any, str] = {Path: "PATH", int: "N", float: "X", str: "NAME"}
"""What help shows for a value, by its type; where the type says little, by the flag's name."""
NAMED = {"data_root": "PATH", "eps": "EPS", "model": "MODULE:NAME", "settings": "FIELD=VALUE"}
NUMBERS = {int: "a whole number", float: "a number"}
WIDTH = 80
"""Columns that help takes at most."""
HELP = ("-h", "--help")


def parse(name: str, command: Command, words: Sequence[str]) -> Callable[[], Any]:
    """Return the call that `words` ask for; help ends the program with 0, words that do not fit with 2.

    Raises:
        InputError: an unknown flag or choice, with the nearest ones, or a value that is no number.
    """
    if any(word in HELP for word in words):
        print(help_of(name, command))
        raise SystemExit(0)
    check(name, command, words)
    return _parsed(name, command, words)


def help_of(name: str, command: Command) -> str:
    """What a command is for, its arguments, and commands to copy, set to 80 columns."""
    kept = _Kept(sys.stdout)
    with redirect_stdout(kept), suppress(SystemExit):
        _parsed(name, command, ["--help"])
    boxes = kept.getvalue().partition("\n")[2].strip("\n")  # after tyro's usage, which may be wider
    parameters = inspect.signature(command).parameters.values()
    hints = get_type_hints(command)
    places = [placeholder(p, hints[p.name]) or "" for p in parameters if p.kind is p.POSITIONAL_ONLY]
    usage = " ".join(["usage: robustfpd", name, *places, "[OPTIONS]"])
    shown = "\n".join(_broken(example) for example in examples(command))
    return f"{usage}\n\n{description(command)}\n\n{boxes}\nexamples:\n{shown}"


class _Kept(io.StringIO):
    """Keeps what would be printed, as it would be."""

    def __init__(self, instead_of: TextIO) -> None:
        super().__init__()
        self.instead_of = instead_of

    def isatty(self) -> bool:
        return self.instead_of.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.instead_of.encoding


def _parsed(name: str, command: Command, words: Sequence[str]) -> Callable[[], Any]:
    call: Callable[[], Any] = tyro.cli(
        described(command), prog=f"robustfpd {name}", description="", args=list(words),
        config=(tyro.conf.FlagCreatePairsOff,),
    )  # fmt: skip
    return call


def described(command: Command) -> Command:
    """A function of the same parameters, with their help for tyro, that returns the call instead of making it."""

    def call(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(command, *args, **kwargs)

    hints, told = get_type_hints(command, include_extras=True), arguments(command)
    parameters = []
    for parameter in inspect.signature(command).parameters.values():
        hint = hints[parameter.name]
        argument = tyro.conf.arg(
            metavar=placeholder(parameter, hint),
            help=told.get(parameter.name, ""),
            help_behavior_hint=_hint(parameter),
        )
        parameters.append(parameter.replace(annotation=Annotated[hint, argument]))
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def description(command: Command) -> str:
    """The docstring without its arguments and examples."""
    columns = min(shutil.get_terminal_size().columns, WIDTH)
    kept = (text for text in _paragraphs(command) if not text.startswith("For example"))
    return "\n\n".join(textwrap.fill(text, columns) for text in kept)


def _broken(example: str) -> str:
    """A command to copy, with a backslash where it goes on in the next line."""
    lines = textwrap.wrap(example, WIDTH - 4, break_long_words=False, break_on_hyphens=False)
    return "  " + " \\\n    ".join(lines)


def examples(command: Command) -> list[str]:
    """Commands to copy, from the docstring."""
    told = (text for text in _paragraphs(command) if text.startswith("For example"))
    return [example for text in told for example in re.findall(r"`(robustfpd [^`]+)`", text)]


def check(name: str, command: Command, words: Sequence[str]) -> None:
    """Refuse what is missing, unknown flags and choices, and what is no number, in one line."""
    hints = get_type_hints(command)
    parameters = inspect.signature(command).parameters.values()
    flags = flags_of(command)
    walked = walk(command, words)
    for place, word in enumerate(walked):
        if not word.is_flag or not word.text.startswith("--") or word.text == "--":
            continue
        flag, equals, value = word.text.partition("=")
        if not word.flag:
            raise unknown_name(f"flag of robustfpd {name}", flag.replace("_", "-"), [*flags, "--help"])
        kind = plain(flags[word.flag])
        values = [value] if equals else _values(walked[place + 1 :], word.flag) or [next(iter(words[place + 1 :]), "")]
        for value in values:
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise unknown_name(word.flag, value, get_args(kind))
            if kind in NUMBERS and not _is_number(value, kind):
                raise InputError(f"{word.flag} takes {NUMBERS[kind]}, found {value!r}")
    needed = [p for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    given = [word.text for word in walked if word.place >= 0]
    for place, parameter in enumerate(needed):
        if len(given) <= place:
            told = arguments(command).get(parameter.name, "").rstrip(".")
            raise InputError(f"robustfpd {name} needs {parameter.name.upper()}: {told}; see robustfpd {name} --help")
        kind = plain(hints[parameter.name])
        if get_origin(kind) is Literal and given[place] not in get_args(kind):
            raise unknown_name(parameter.name, given[place], get_args(kind))


@dataclass(frozen=True)
class Word:
    """A word after a command, and what it is there for."""

    text: str
    flag: str = ""
    """The flag that it is or belongs to, as help writes it; empty for an unknown one and for a word without any."""
    place: int = -1
    """Which of the words without a flag it is, from 0; -1 where it is none."""

    @property
    def is_flag(self) -> bool:
        """Whether it names a flag, maybe with a value behind "="."""
        return _names_a_flag(self.text)


def walk(command: Command, words: Sequence[str]) -> list[Word]:
    """Tell flags, their values and other words apart, as argparse does."""
    flags, walked = flags_of(command), list[Word]()
    taking, rest, places = "", False, 0
    for text in words:
        if _names_a_flag(text):
            given, equals, _ = text.partition("=")
            flag = given.replace("_", "-") if given.replace("_", "-") in flags else ""
            walked.append(Word(text, flag))
            taking = flag if flag and not equals and plain(flags[flag]) is not bool else ""
            rest = bool(taking) and several(flags[flag])
        elif taking:
            walked.append(Word(text, taking))
            taking = taking if rest else ""
        else:
            walked.append(Word(text, place=places))
            places += 1
    return walked


def _names_a_flag(text: str) -> bool:
    """Whether a word begins as flags do; "-" and negative numbers are values."""
    return text.startswith("-") and text != "-" and not re.fullmatch(r"-\d+|-\d*\.\d+", text)


def _values(walked: Sequence[Word], flag: str) -> list[str]:
    """The words up to the next flag that belong to `flag`."""
    return [word.text for word in itertools.takewhile(lambda w: w.flag == flag and not w.is_flag, walked)]


def flags_of(command: Command) -> dict[str, Any]:
    """The flags of a command and their types."""
    hints, parameters = get_type_hints(command), inspect.signature(command).parameters.values()
    return {f"--{p.name.replace('_', '-')}": hints[p.name] for p in parameters if p.kind is not p.POSITIONAL_ONLY}


def _is_number(text: str, kind: type) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _paragraphs(command: Command) -> list[str]:
    """The docstring up to its arguments, each paragraph on one line."""
    text = inspect.cleandoc(command.__doc__ or "").partition("\nArgs:")[0]
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def arguments(command: Command) -> dict[str, str]:
    """What the docstring says of each parameter, on one line, so that it is set to the width of the terminal."""
    text = inspect.cleandoc(command.__doc__ or "").partition("\nArgs:\n")[2]
    entries = re.findall(r"^    (\w+): (.*(?:\n(?:     +.*)?)*)", text, flags=re.MULTILINE)
    return {name: " ".join(told.split()) for name, told in entries}


def plain(hint: Any) -> Any:
    """The type of one value: without markers, None and the tuple around it."""
    while True:
        if get_origin(hint) is Annotated:
            hint = get_args(hint)[0]
            continue
        inner = [kind for kind in get_args(hint) if kind not in (type(None), Ellipsis)]
        if get_origin(hint) is Literal or len(inner) != 1:
            return hint
        hint = inner[0]


def several(hint: Any) -> bool:
    """Whether a parameter takes several values."""
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_origin(bare) is tuple


def placeholder(parameter: inspect.Parameter, hint: Any) -> str | None:
    """What stands for the value in help; None for a flag without one."""
    kind, name = plain(hint), parameter.name
    positional = parameter.kind is parameter.POSITIONAL_ONLY
    if kind is bool:
        return None
    if get_origin(kind) is Literal and not positional:
        return f"{{{','.join(get_args(kind))}}}"
    one = NAMED.get(name, name.upper() if positional else PLACEHOLDERS.get(kind, name.upper()))
    if positional:
        shown = f"{one} ..." if several(hint) else one
        return shown if parameter.default is parameter.empty else f"[{shown}]"
    return f"{one} [{one} ...]" if several(hint) else one


def _hint(parameter: inspect.Parameter) -> Callable[[str], str]:
    """The default as help tells it; nothing, None and False go without saying."""
    default = parameter.default
    said = default is not parameter.empty and default not in (None, False, ())
    return lambda shown: f"(default: {shown})" if said else ""
