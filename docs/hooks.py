"""What pages show of the code itself is put in when they are built: commands with their flags, recipes."""

from __future__ import annotations

import inspect
import re
from typing import Any, get_type_hints

from robustfpd.cli import COMMANDS, function, parsing
from robustfpd.config import RECIPES, recipe, recipe_names

FOREIGN = re.compile(r"cdnjs|data:text/javascript|x-mathjax-config")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marks in a page."""
    for mark, made in (("<!-- commands -->", _commands), ("<!-- recipes -->", _recipes)):
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    return markdown


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Mend the notebook's page, whose template would fetch scripts for formulas, and whose links stay as they are."""
    if not page.file.src_uri.endswith(".ipynb"):
        return output
    scripts = re.compile(r"<script[^>]*>(?:(?!</script>).)*</script>", flags=re.DOTALL)
    kept = scripts.sub(lambda found: "" if FOREIGN.search(found.group()) else found.group(), output)
    kept = kept.replace('<div class="highlight-ipynb', '<div tabindex="0" class="highlight-ipynb')  # they scroll
    return re.sub(r'href="([\w/-]+)\.md(#[\w-]+)?"', r'href="\1.html\2"', kept)


def _commands() -> str:
    return "\n\n".join(_command(name, told) for name, told in COMMANDS.items())


def _command(name: str, told: str) -> str:
    command = function(name)
    about = parsing.description(command)
    examples = "\n".join(parsing.examples(command))
    shown = f"```sh\n{examples}\n```" if examples else ""
    heading = f"## robustfpd {name} {{ #{name} }}"
    return "\n\n".join([heading, f"*{told[0].upper()}{told[1:]}.*", about, shown, _flags(command)])


def _flags(command: Any) -> str:
    """A list of what a command takes, as `--help` tells it."""
    hints, told = get_type_hints(command, include_extras=True), parsing.arguments(command)
    rows = []
    for parameter in inspect.signature(command).parameters.values():
        value = parsing.placeholder(parameter, hints[parameter.name]) or ""
        positional = parameter.kind is parameter.POSITIONAL_ONLY
        flag = value if positional else f"--{parameter.name.replace('_', '-')} {value}".strip()
        default = parameter.default
        said = "" if default in (inspect.Parameter.empty, None, False, ()) else f" Default: `{default}`."
        rows.append(f"- `{flag}`: {told.get(parameter.name, '')}{said}")
    return "\n".join(rows) if rows else "It takes nothing."


def _recipes() -> str:
    rows = ["| recipe | backbone | noise | epochs | published too |", "|---|---|---|---|---|"]
    for name in recipe_names():
        run = recipe(name)
        published = "yes" if "\npublished:" in (RECIPES / f"{name}.yaml").read_text() else ""
        settings = f"`{run.model.backbone}` | {run.training.noise:g} | {run.training.epochs}"
        rows.append(f"| `{name}` | {settings} | {published} |")
    return "\n".join(rows)
