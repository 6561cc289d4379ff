"""`robustfpd recipes`."""

from __future__ import annotations


def recipes() -> None:
    """List the packaged recipes: what `robustfpd train` can be given.

    Example: robustfpd recipes
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from robustfpd import data
    from robustfpd.config import RECIPES, recipe, recipe_names

    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for heading in ("image", "backbone", "noise", "epochs", "published"):
        table.add_column(heading, overflow="fold")
    for name in recipe_names():
        run = recipe(name)
        height, width = run.data.image_size or data.info(run.data.dataset).image_size
        published = "yes" if "\npublished:" in (RECIPES / f"{name}.yaml").read_text() else ""
        training = run.training
        table.add_row(
            name,
            str(height) if height == width else f"{height}×{width}",
            run.model.backbone,
            f"{training.noise:g}",
            str(training.epochs),
            published,
        )
    console = Console(soft_wrap=True)
    console.print(table)
    console.print("published: also in the authors' protocol, train --protocol published (docs/protocols.md)")
