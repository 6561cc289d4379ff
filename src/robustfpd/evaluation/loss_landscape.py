"""The loss around one image, on a plane through the image and an adversarial point.

As in Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018, but over pixels instead of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustfpd.attacks.base import reproducible
from robustfpd.attacks.losses import margin
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Config
from robustfpd.evaluation.attack_runner import AttackRunner
from robustfpd.evaluation.ledger import LedgerRow

ALONG, ACROSS = (-0.5, 1.5), (-1.0, 1.0)
POINTS = 21


class LossLandscape(Config):
    """Margins on a grid of points around an image."""

    image: int
    attack: str
    eps: float
    distance: float
    """Norm of the perturbation: one unit of either axis."""
    along: tuple[float, ...]
    """Steps towards the adversarial point: 0 is the image, 1 that point."""
    across: tuple[float, ...]
    """Steps of the same norm in a random direction."""
    margin: tuple[tuple[float, ...], ...]
    """Best wrong logit minus the true one, a row for each step across; above 0 the image is misclassified."""


@torch.no_grad()
def loss_landscape(
    view: nn.Module, clean: Tensor, adversarial: Tensor, of: LedgerRow, runner: AttackRunner, draws: torch.Generator
) -> LossLandscape:
    """Ask a classifier about points around an image.

    Args:
        view: images → logits.
        clean: the image, C×H×W in [0, 1].
        adversarial: a point near it; the two must differ.
        of: what the ledger says of that point.
        runner: device, norm and batch size.
        draws: the random direction's.
    """
    towards = (adversarial - clean).float()
    sideways = (2 * torch.randint(0, 2, clean.shape, generator=draws) - 1).float()
    size = lp_ball(runner.norm).norm
    sideways *= float(size(towards[None])) / float(size(sideways[None]))
    along, across = torch.linspace(*ALONG, POINTS), torch.linspace(*ACROSS, POINTS)
    b, a = torch.meshgrid(across, along, indexing="ij")
    points = clean + a.reshape(-1, 1, 1, 1) * towards + b.reshape(-1, 1, 1, 1) * sideways
    points = points.clamp(0, 1).to(clean.dtype)
    margins = []
    with reproducible(draws):
        for part in torch.split(points, runner.batch_size):
            labels = torch.full((len(part),), of.label, device=runner.device)
            margins.append(margin(view(part.to(runner.device)).float(), labels).cpu())
    grid = torch.cat(margins).nan_to_num(0, 0, 0).reshape(POINTS, POINTS)
    return LossLandscape(
        image=of.image, attack=of.attack, eps=of.eps, distance=of.distance, along=tuple(along.tolist()),
        across=tuple(across.tolist()), margin=tuple(tuple(line) for line in grid.tolist()),
    )  # fmt: skip
