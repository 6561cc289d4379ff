"""mkdocs hooks: insert the commands' help and the recipes, and repair the notebook's page."""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from robustfpd.cli import COMMANDS, main
from robustfpd.config import RECIPES, recipe, recipe_names
from robustfpd.evaluation.robustness import format_eps
from robustfpd.report.leaderboard import leaderboard, read_entries, zoo_entries

FOREIGN = re.compile(r"cdnjs|data:text/javascript|x-mathjax-config")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace a page's placeholders by generated Markdown."""
    marks = (("<!-- commands -->", _commands), ("<!-- recipes -->", _recipes), ("<!-- leaderboard -->", _leaderboard))
    for mark, made in marks:
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    return markdown


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Remove the scripts that the notebook's template loads from elsewhere, and rewrite its links to .html."""
    if not page.file.src_uri.endswith(".ipynb"):
        return output
    scripts = re.compile(r"<script[^>]*>(?:(?!</script>).)*</script>", flags=re.DOTALL)
    kept = scripts.sub(lambda found: "" if FOREIGN.search(found.group()) else found.group(), output)
    kept = kept.replace('<div class="highlight-ipynb', '<div tabindex="0" class="highlight-ipynb')  # they scroll
    return re.sub(r'href="([\w/-]+)\.md(#[\w-]+)?"', r'href="\1.html\2"', kept)


def _commands() -> str:
    return "\n\n".join(_command(name, summary) for name, summary in COMMANDS.items())


def _command(name: str, summary: str) -> str:
    """Return a section with a command's help."""
    os.environ["COLUMNS"] = "80"
    with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
        main([name, "--help"])
    shown = f"```text\n{text.getvalue().strip()}\n```"
    return f"## robustfpd {name} {{ #{name} }}\n\n*{summary[0].upper()}{summary[1:]}.*\n\n{shown}"


def _leaderboard() -> str:
    """Return the tables of the zoo's networks and of the entries in results/leaderboard."""
    root = Path(__file__).parents[1]
    entries = [*zoo_entries(root / "models"), *read_entries(root / "results" / "leaderboard")]
    return "\n".join(leaderboard(entries))


def _recipes() -> str:
    rows = ["| recipe | backbone | trained with | epochs | published too |", "|---|---|---|---|---|"]
    for name in recipe_names():
        run = recipe(name)
        published = "yes" if "\npublished:" in (RECIPES / f"{name}.yaml").read_text() else ""
        noise, eps = f"noise {run.training.noise:g}", f"attack {format_eps(run.adversarial.eps)}"
        perturbation = noise if run.stage == "two-phase" else eps
        settings = f"`{run.model.backbone}` | {perturbation} | {run.procedure.epochs}"
        rows.append(f"| `{name}` | {settings} | {published} |")
    return "\n".join(rows)
