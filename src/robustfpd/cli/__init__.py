"""The command line: each command is the function of its name in the module of its name, imported when it is called.

tyro parses a command's signature and makes its help and the shell completion. A docstring's paragraph that begins with
"For example" holds commands in backticks, which help lists as examples.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any, get_type_hints

from robustfpd.errors import InputError, ReportedByOtherRank, unknown_name

COMMANDS = {
    "demo": "train, attack and report on small digits, offline, in minutes",
    "train": "train a recipe's network, with the defence or without",
    "evaluate": "attack a network: robust accuracy, and a verdict",
    "report": "write an HTML report; compare several runs",
    "doctor": "check a network and its data, without attacks",
    "predict": "classify images, and measure the effect of restoration",
    "export": "export a network as ONNX or a torch program",
    "recipes": "list the recipes",
    "datasets": "list the data sets, and how to get them",
    "models": "list the trained networks that come with robustfpd",
    "convert": "convert the authors' checkpoints to saved models",
}
"""Every command and its summary, in the order of help."""

OVERVIEW = """\
Harden an image classifier with a Feature Pyramid Decoder, and measure how
robust it is.

Try it on small digits, offline:
  robustfpd demo

With your own images, in one folder per class:
  robustfpd train folder/mini --data-root PHOTOS   train, into runs/folder-mini
  robustfpd evaluate runs/folder-mini              attack it
  robustfpd report runs/folder-mini                write a report

With your own network, returned by the function `make` in mynets.py:
  robustfpd train folder/mini --data-root PHOTOS model.backbone=mynets:make
  robustfpd evaluate runs/folder-mini --trust-code
To attack that network without the defence:
  robustfpd evaluate --model mynets:make --dataset folder --data-root PHOTOS

All commands:
"""
OPTIONS = """
`robustfpd COMMAND --help` lists a command's options and examples. All take
--json and --quiet; `train` and `evaluate` estimate their time with --dry-run.
To enable completion in bash (also zsh and fish), add to ~/.bashrc:
  source <(robustfpd --tyro-print-completion bash)
"""
WIDTH = 80
"""Columns that help takes at most."""
SETTING = re.compile(r"(seed|[a-z]\w*(\.\w+)+)=.*", re.DOTALL)
"""A word `seed=value` or `group.field=value` of `train`."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; an error of the user's ends with one message and exit code 2, an interrupt with 130."""
    words = list(sys.argv[1:] if argv is None else argv)
    with _exit_codes():
        if not words or words[0] in ("-h", "--help", "help"):
            print(overview(), end="")
        elif words[0] == "--version":
            from robustfpd import __version__

            print(f"robustfpd {__version__}")
        elif words[0].startswith("--tyro-"):
            _print_completion(words)
        else:
            parse(words)()


def overview() -> str:
    """Return what `robustfpd` without arguments prints."""
    return OVERVIEW + "".join(f"  {name:<11} {summary}\n" for name, summary in COMMANDS.items()) + OPTIONS


def function(name: str) -> Callable[..., Any]:
    """Import a command; an unknown name is an InputError with the nearest ones."""
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    command: Callable[..., Any] = getattr(import_module(f"robustfpd.cli.{name}"), name)
    return command


def parse(words: Sequence[str]) -> Callable[[], Any]:
    """Return the call that a command line means; help exits with 0, arguments that do not fit with 2.

    Raises:
        InputError: an unknown command.
    """
    import tyro

    name, *rest = words
    command = function(name)
    if name == "train":  # tyro takes a list of words only where they are adjacent
        rest.sort(key=lambda word: SETTING.fullmatch(word) is not None)
    call: Callable[[], Any] = tyro.cli(
        bound(command), prog=f"robustfpd {name}", description=description(command), args=rest, config=tyro_config()
    )
    return call


def bound(command: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """Return a function with the command's parameters that returns the call instead of making it."""
    import tyro

    def call(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(command, *args, **kwargs)

    def parameter(p: inspect.Parameter) -> inspect.Parameter:
        if p.default is None or p.default is False or p.default == ():  # "(default: None)" says nothing
            return p.replace(annotation=Annotated[hints[p.name], tyro.conf.arg(help_behavior_hint="")])
        return p.replace(annotation=hints[p.name])

    hints = get_type_hints(command, include_extras=True)
    parameters = [parameter(p) for p in inspect.signature(command).parameters.values()]
    arguments = inspect.cleandoc(command.__doc__ or "").partition("\nArgs:\n")[2]
    # Each argument on one line, which tyro wraps; the description is given to it apart.
    call.__doc__ = f"{command.__name__}.\n\nArgs:\n" + re.sub(r"\n {8,}", " ", arguments)
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def description(command: Callable[..., Any]) -> str:
    """Return a command's docstring without its arguments, wrapped for help, with the examples at the end."""
    columns = min(shutil.get_terminal_size().columns, WIDTH)
    wrap = functools.partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)
    paragraphs = [text for text in _paragraphs(command) if not text.startswith("For example")]
    # Later lines are indented: tyro joins a line that begins with a letter to the one before.
    texts = ["\n".join(wrap(text, columns, subsequent_indent=" ")) for text in paragraphs]
    shown = [" \\\n    ".join(wrap(text, columns - 6)) for text in examples(command)]
    return "\n\n".join([*texts, "\n  ".join(["examples:", *shown])])


def examples(command: Callable[..., Any]) -> list[str]:
    """Return the example commands of a docstring."""
    texts = (text for text in _paragraphs(command) if text.startswith("For example"))
    return [example for text in texts for example in re.findall(r"`(robustfpd [^`]+)`", text)]


def _paragraphs(command: Callable[..., Any]) -> list[str]:
    """Return the docstring's paragraphs up to its arguments, each on one line."""
    text = inspect.cleandoc(command.__doc__ or "").partition("\nArgs:")[0]
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def tyro_config() -> tuple[Any, ...]:
    """Return tyro's settings for every command."""
    from tyro import conf

    return conf.FlagCreatePairsOff, conf.DisallowNone, conf.PositionalMetavarFromFieldName, conf.OmitArgPrefixes


def _print_completion(words: Sequence[str]) -> None:
    """Print tyro's completion script over all commands."""
    import tyro

    commands = {name: bound(function(name)) for name in COMMANDS}
    tyro.extras.subcommand_cli_from_dict(commands, prog="robustfpd", args=words, config=tyro_config())


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn errors of the user's into messages and exit codes, without a traceback."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # it announces the precision
    show_warning = warnings.showwarning
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        yield
    except BrokenPipeError:  # the reader of our output closed it
        sys.stdout = None
        raise SystemExit(1) from None
    except ReportedByOtherRank:
        raise SystemExit(2) from None
    except (InputError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        _print_error(f"error: {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        warnings.showwarning = show_warning


def _show_warning(message: Warning | str, *_: Any) -> None:
    """Print a warning without the line of code that it comes from."""
    _print_error(f"warning: {message}")


def _print_error(text: str) -> None:
    """Print on standard error, wrapped if it is a terminal."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    print(text, file=sys.stderr)
