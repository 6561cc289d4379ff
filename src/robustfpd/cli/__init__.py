"""The command line. Each command is the function of its name in the file of its name, imported when it is asked for."""

from __future__ import annotations

import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from robustfpd.errors import InputError, ReportedByOtherRank, unknown_name

COMMANDS = {
    "demo": "the whole journey on small digits, offline, in two minutes",
    "train": "train a recipe's network, with the defence or without",
    "evaluate": "attack it: how much withstands, and whether to trust that",
    "report": "a page to read and to show; several runs side by side",
    "doctor": "find in seconds what would ruin an evaluation",
    "predict": "classify images, and tell what restoration changed",
    "export": "write a network as ONNX or a torch program, verified",
    "recipes": "what can be trained",
    "datasets": "which images are there, and how to get the others",
    "models": "trained networks that come with robustfpd",
    "convert": "turn the authors' checkpoints into models of ours",
    "completion": "let the shell complete commands, flags and names",
}
"""Every command and what it does, in the order of help."""

ASKING = "__complete"
"""What shells call instead of a command, with the words typed so far."""

JOURNEY = """\
Harden an image classifier with a Feature Pyramid Decoder, and measure how
robust it is.

See it on small digits, offline, in two minutes:
  robustfpd demo

With photographs of your own, in a folder for each class:
  robustfpd train folder/mini --data-root PHOTOS   train, into runs/folder-mini
  robustfpd evaluate runs/folder-mini              attack it
  robustfpd report runs/folder-mini                read what robust, and why

With a network of your own, made by the function `make` in mynets.py:
  robustfpd train folder/mini --data-root PHOTOS model.backbone=mynets:make
  robustfpd evaluate runs/folder-mini --trust-code
To attack it as it is, without the defence:
  robustfpd evaluate --model mynets:make --dataset folder --data-root PHOTOS

All commands:
"""
ENDING = """
`robustfpd COMMAND --help` has examples. All but completion take --json and
--quiet; `train` and `evaluate` tell with --dry-run what they would do.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; what the user can mend ends with one line and exit code 2, an interrupt with 130."""
    words = list(sys.argv[1:] if argv is None else argv)
    with _ending_well():
        if not words or words[0] in ("-h", "--help", "help"):
            print(overview(), end="")
        elif words[0] == ASKING:
            from robustfpd.cli.completion import answers

            print("".join(f"{answer}\n" for answer in answers(words[1:])), end="")  # an empty line would be an answer
        elif words[0] == "--version":
            from robustfpd import __version__

            print(f"robustfpd {__version__}")
        else:
            from robustfpd.cli.common import settings_together
            from robustfpd.cli.parsing import parse

            name, *rest = words
            parse(name, function(name), settings_together(rest) if name == "train" else rest)()


def overview() -> str:
    """What `robustfpd` alone shows."""
    return JOURNEY + "".join(f"  {name:<11} {told}\n" for name, told in COMMANDS.items()) + ENDING


def function(name: str) -> Callable[..., Any]:
    """Import a command; an unknown name is an InputError with the nearest ones."""
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    found: Callable[..., Any] = getattr(import_module(f"robustfpd.cli.{name}"), name)
    return found


@contextmanager
def _ending_well() -> Iterator[None]:
    """No traceback for what is no fault of ours."""
    shown = warnings.showwarning
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        yield
    except BrokenPipeError:  # whoever read our output has had enough of it
        sys.stdout = None
        raise SystemExit(1) from None
    except ReportedByOtherRank:
        raise SystemExit(2) from None
    except (InputError, OSError) as error:  # OSError: a folder that cannot be written, a full disk
        _tell(f"error: {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        warnings.showwarning = shown


def _show_warning(message: Warning | str, *_: Any) -> None:
    """Without the place in our code that says it."""
    _tell(f"warning: {message}")


def _tell(text: str) -> None:
    """On standard error, broken between words where it is a terminal."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    print(text, file=sys.stderr)
