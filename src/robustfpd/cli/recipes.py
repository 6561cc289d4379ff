"""`robustfpd recipes`."""

from __future__ import annotations

from robustfpd.cli.common import Output


def recipes(output: Output = Output()) -> None:  # noqa: B008
    """List the packaged recipes, whose names `robustfpd train` takes.

    Recipes */mini train on noisy images, and with `--stages two-phase,adversarial` on adversarial images too; recipes
    */robust train on adversarial images only.

    For example `robustfpd recipes`, or `robustfpd recipes --json`.
    """
    from rich.box import SIMPLE
    from rich.table import Table

    from robustfpd import data
    from robustfpd.config import RECIPES, recipe, recipe_names
    from robustfpd.evaluation.robustness import format_eps

    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    for heading in ("image", "backbone", "trained with", "epochs", "published"):
        table.add_column(heading, overflow="fold")
    listed = []
    for name in recipe_names():
        run = recipe(name)
        height, width = run.data.image_size or data.info(run.data.dataset).image_size
        published = "\npublished:" in (RECIPES / f"{name}.yaml").read_text()
        size = str(height) if height == width else f"{height}×{width}"
        noise, eps, epochs = run.training.noise, run.adversarial.eps, run.procedure.epochs
        perturbation = f"noise {noise:g}" if run.stage == "two-phase" else f"eps {format_eps(eps)}"
        table.add_row(name, size, run.model.backbone, perturbation, str(epochs), "yes" if published else "")
        listed.append({
            "name": name, "dataset": run.data.dataset, "image_size": [height, width], "backbone": run.model.backbone,
            "stage": run.stage, "noise": noise, "adversarial_eps": eps, "epochs": epochs, "published": published,
        })  # fmt: skip
    output.print(table, "published: also in the authors' protocol, train --protocol published (docs/protocols.md)")
    output.print_result({"recipes": listed})
