"""`robustfpd completion`, and the answers that shells get: tyro's own scripts know no arguments without a flag."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

BASH = """\
_robustfpd() {
  local IFS=$'\\n'
  COMPREPLY=($("${COMP_WORDS[0]}" __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
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
    from robustfpd.cli.parsing import flags_of

    *before, now = [word for word in words if word != "="] or [""]  # bash parts --flag=value
    if not before:
        return _beginning(COMMANDS, now)
    if before[0] not in COMMANDS:
        return []
    command = function(before[0])
    if now.startswith("-"):
        return _beginning([*flags_of(command), "--help"], now)
    parameter = _asked(command, before[1:])
    if parameter is None:
        return []
    return _beginning(_names(parameter, get_type_hints(command)[parameter]), now)


def _asked(command: Any, before: Sequence[str]) -> str | None:
    """The parameter that the next word is for; None where there is none."""
    from robustfpd.cli.parsing import flags_of, plain, several

    flags, taking, rest, places = flags_of(command), "", False, 0
    for word in before:
        if word.startswith("-"):
            flag = word.partition("=")[0].replace("_", "-")
            taking = flag if flag in flags and plain(flags[flag]) is not bool else ""
            rest = bool(taking) and several(flags[flag])
        elif taking:
            taking = taking if rest else ""
        else:
            places += 1
    if taking:
        return taking.removeprefix("--").replace("-", "_")
    hints, parameters = get_type_hints(command), inspect.signature(command).parameters.values()
    open_ = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY]
    if places < len(open_):
        return open_[places]
    return open_[-1] if open_ and several(hints[open_[-1]]) else None


def _names(parameter: str, hint: Any) -> Collection[str]:
    """Names that a parameter chooses from."""
    from robustfpd.cli.parsing import plain
    from robustfpd.config import DATASETS, DEVICES, NORMS, STAGES, SUITES, recipe_names

    kind = plain(hint)
    if get_origin(kind) is Literal:
        return get_args(kind)
    if parameter in ("run", "runs", "surrogate"):
        from robustfpd.models import shipped

        return [*shipped.names(), *(str(path.parent) for path in Path("runs").glob("*/config.yaml"))]
    lists: dict[str, Collection[str]] = {
        "dataset": DATASETS, "device": DEVICES, "norm": NORMS, "suite": SUITES,
        "stages": [*STAGES, ",".join(STAGES)],
    }  # fmt: skip
    return recipe_names() if parameter == "recipe" else lists.get(parameter, ())


def _beginning(names: Collection[str], start: str) -> list[str]:
    return [name for name in names if name.startswith(start)]
