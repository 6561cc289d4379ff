"""The command line. One file per command; heavy imports happen inside the commands, so that help is quick."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from robustfpd.cli.convert import convert
from robustfpd.cli.datasets import datasets
from robustfpd.cli.demo import demo
from robustfpd.cli.evaluate import evaluate
from robustfpd.cli.models import models
from robustfpd.cli.recipes import recipes
from robustfpd.cli.running import settings_together
from robustfpd.cli.train import train
from robustfpd.errors import InputError, unknown_name

COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo, "train": train, "evaluate": evaluate, "recipes": recipes, "datasets": datasets, "models": models,
    "convert": convert,
}  # fmt: skip

DESCRIPTION = """Harden an image classifier with a Feature Pyramid Decoder, and measure how robust it is.

Begin with `robustfpd demo`; then `robustfpd train RECIPE`, `robustfpd evaluate RUN`."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; what the user can mend ends with one line and exit code 2, an interrupt with 130."""
    import tyro

    arguments = list(sys.argv[1:] if argv is None else argv)
    shown = warnings.showwarning
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
            raise unknown_name("command", arguments[0], COMMANDS)
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="robustfpd", description=DESCRIPTION, args=settings_together(arguments) or ["--help"],
            sort_subcommands=False,
        )  # fmt: skip
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:  # a folder that cannot be written, a full disk
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        warnings.showwarning = shown


def _show_warning(message: Warning | str, *_: Any) -> None:
    """One line, without the place in our code that says it."""
    print(f"warning: {message}", file=sys.stderr)
