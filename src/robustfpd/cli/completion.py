"""`robustfpd completion`, and the answers that shells get: tyro's own scripts know no arguments without a flag."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

BASH = """\
_robustfpd() {
  local found
  COMPREPLY=()
  while IFS= read -r found; do  # neither split nor globbed; bash 3 of macOS has no mapfile
    COMPREPLY+=("$found")
  done < <("${COMP_WORDS[0]}" __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -F _robustfpd robustfpd
"""
ZSH = """\
#compdef robustfpd
_robustfpd() {
  local -a found
  found=("${(@f)$("${words[1]}" __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  if [[ -n "${found[*]}" ]]; then compadd -- "${found[@]}"; else _files; fi
}
if [[ $funcstack[1] == _robustfpd ]]; then _robustfpd "$@"; else compdef _robustfpd robustfpd; fi
"""
FISH = """\
complete -c robustfpd -a '(robustfpd __complete (commandline -opc)[2..] (commandline -ct))'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def completion(shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]], /) -> None:
    """Print a script that lets a shell complete commands, flags, recipes, runs and other names.

    bash: add `eval "$(robustfpd completion bash)"` to ~/.bashrc.

    zsh: add `eval "$(robustfpd completion zsh)"` to ~/.zshrc, below compinit.

    fish: write `robustfpd completion fish` into ~/.config/fish/completions/robustfpd.fish.

    For example `robustfpd completion bash`, or `robustfpd completion zsh > ~/.zfunc/_robustfpd`.

    Args:
        shell: bash, zsh or fish.
    """
    print(SCRIPTS[shell], end="")


def answers(words: Sequence[str]) -> list[str]:
    """What the last of `words` may become; nothing where any file may be meant, or anything else."""
    from robustfpd.cli import COMMANDS, function
    from robustfpd.cli.parsing import flags_of, walk

    *before, now = _whole(words) or [""]
    if not before:
        return _beginning(COMMANDS, now)
    if before[0] not in COMMANDS:
        return []
    command = function(before[0])
    flag, equals, start = now.partition("=")
    if now.startswith("-") and not equals:
        return _beginning([*flags_of(command), "--help"], now)
    last = walk(command, [*before[1:], now])[-1]
    if now.startswith("-"):
        # bash parts --flag=value and replaces the value alone; zsh and fish replace the word.
        kept = f"{flag}=" if words[-1] == now else ""
        return [kept + name for name in _named(command, last.flag, start)]
    return _named(command, last.flag or _place(command, last.place), now)


def _whole(words: Sequence[str]) -> list[str]:
    """Words that bash parted at "=", put together again."""
    found: list[str] = []
    parted = False
    for word in words:
        if found and (parted or word == "="):
            found[-1] += word
        else:
            found.append(word)
        parted = word == "=" and not parted
    return found


def _place(command: Any, place: int) -> str:
    """The parameter of the word at a place; empty where there is none."""
    from robustfpd.cli.parsing import several

    hints, parameters = get_type_hints(command), inspect.signature(command).parameters.values()
    open_ = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if place < len(open_):
        return open_[place]
    return open_[-1] if open_ and several(hints[open_[-1]]) else ""


def _named(command: Any, parameter: str, start: str) -> list[str]:
    """Names that begin so, of those that a parameter, or the flag for it, chooses from."""
    parameter = parameter.removeprefix("--").replace("-", "_")
    hints = get_type_hints(command)
    return _beginning(_names(parameter, hints[parameter]), start) if parameter in hints else []


def _names(parameter: str, hint: Any) -> Collection[str]:
    """Names that a parameter chooses from."""
    from robustfpd.cli.parsing import plain
    from robustfpd.config import DATASETS, DEVICES, NORMS, STAGES, SUITES, recipe_names

    kind = plain(hint)
    if get_origin(kind) is Literal:
        return get_args(kind)
    if parameter in ("run", "runs", "surrogate"):
        from robustfpd.models import zoo

        return [*zoo.names(), *sorted(str(path.parent) for path in Path("runs").glob("*/config.yaml"))]
    lists: dict[str, Collection[str]] = {
        "dataset": DATASETS, "device": DEVICES, "norm": NORMS, "suite": SUITES,
        "stages": [*STAGES, ",".join(STAGES)],
    }  # fmt: skip
    return recipe_names() if parameter == "recipe" else lists.get(parameter, ())


def _beginning(names: Collection[str], start: str) -> list[str]:
    return [name for name in names if name.startswith(start)]
