"""`robustfpd recipes`."""

from __future__ import annotations


def recipes() -> None:
    """List the packaged recipes: what `robustfpd train` can be given.

    Example: robustfpd recipes
    """
    from rich.console import Console
    from rich.table import Table

    from robustfpd.config import recipe, recipe_names

    table = Table("recipe", "data set", "backbone", "head", "noise", "epochs")
    for name in recipe_names():
        run = recipe(name)
        training = run.training
        table.add_row(
            name, run.data.dataset, run.model.backbone, run.model.head, f"{training.noise:g}", str(training.epochs)
        )
    Console().print(table)
