"""Views of a classifier that an attacker who knows the defence differentiates instead of the classifier.

Athalye et al., "Obfuscated Gradients", ICML 2018; Carlini et al., "On Evaluating Adversarial Robustness", 2019;
Tramèr et al., "On Adaptive Attacks", NeurIPS 2020. What an attack finds on a view counts only if it fools the
classifier itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.attacks.bpda import BPDA, non_differentiable_modules, straight_through
from robustfpd.attacks.losses import LossFunction
from robustfpd.models import FPD, FPDClassifier
from robustfpd.models.denoise import Bottleneck, NonLocal

LOGITS = "logits"
PRE_SQUASH = "pre-squash"
JOINT_WEIGHT = 10.0
"""Of the restoration loss (mean squared error in [0, 1], about 0.02) beside cross-entropy (of order 1)."""


@dataclass(frozen=True)
class View:
    """A module to attack instead of the classifier."""

    module: nn.Module
    """Images N×C×H×W → logits N×K."""
    loss: LossFunction | None = None
    """The loss that belongs to it; None leaves the attack its own."""
    surrogate: bool = False
    """It is another network, so that a point which fools it may not fool the classifier."""


def views(classifier: nn.Module) -> dict[str, nn.Module]:
    """Return the classifier and, for an FPD that squashes its logits, the logits before squashing, by name."""
    found: dict[str, nn.Module] = {LOGITS: classifier}
    if isinstance(classifier, FPDClassifier) and classifier.squash and classifier.fpd.head.squashes:
        found[PRE_SQUASH] = classifier.fpd.classifier(squash=False)
    return found


def adaptive_views(classifier: nn.Module, images: Tensor) -> dict[str, View]:
    """Return every view that an attacker would try, by name, the classifier itself first.

    For an FPD: its logits before squashing; straight through the restoration, and through the denoising; the front
    pass and the back pass alone; cross-entropy with the restoration loss added or taken away. For any other module:
    straight through those of its submodules that keep a shape and pass no gradient.

    Args:
        classifier: the module under attack, in evaluation mode.
        images: a few images, N×C×H×W, to find submodules without gradients with.
    """
    found = {name: View(module) for name, module in views(classifier).items()}
    if isinstance(classifier, FPDClassifier):
        return found | _fpd_views(classifier.fpd)
    try:
        dead = non_differentiable_modules(classifier, images)
    except Exception:  # one that takes batches of one size only, say; the checks tell what attacks cannot do
        dead = []
    if dead:
        found["straight-through"] = View(BPDA(classifier, dead))
    return found


def as_classifier(model: nn.Module) -> nn.Module:
    """Return the plain images → logits module of one of our models; any other module is one already."""
    return model.classifier() if isinstance(model, FPD) else model


def _fpd_views(fpd: FPD) -> dict[str, View]:
    found = {
        "bpda-restoration": View(_Through(fpd, restored="identity")),
        "front-pass": View(_Through(fpd, input_detached=True)),
    }
    if fpd.config.middle == "input":  # elsewhere the back pass sees nothing but the restored image
        found["back-pass"] = View(_Through(fpd, restored="detached"))
    denoising = [m for m in fpd.modules() if isinstance(m, (NonLocal, Bottleneck))]
    if denoising or fpd.config.middle != "none":
        found["bpda-denoising"] = View(BPDA(_Through(fpd, input_detached=True), denoising))
    for name, sign in (("joint", 1.0), ("joint-hidden", -1.0)):
        module = _Through(fpd, joint=True)
        found[name] = View(module, _joint(module, sign))
    return found


class _Through(nn.Module):
    """An FPD's pre-squash logits with another way back for gradients; what goes forward is the same."""

    def __init__(self, fpd: FPD, *, restored: str = "exact", input_detached: bool = False, joint: bool = False) -> None:
        super().__init__()
        self.fpd = fpd
        self.restored, self.input_detached, self.joint = restored, input_detached, joint
        self.restoration: Tensor | None = None
        """Restoration loss of each image of the last batch, N, until the loss has taken it: it holds the graph."""

    def forward(self, images: Tensor) -> Tensor:
        """Classify images N×C×H×W: logits N×K before squashing."""
        restored = self.fpd.restore(images)
        if self.joint:
            self.restoration = F.mse_loss(restored, images, reduction="none").flatten(1).mean(dim=1)
        if self.restored == "detached":
            restored = restored.detach()
        elif self.restored == "identity":
            restored = straight_through(images, restored)
        around = images.detach() if self.input_detached else images
        logits: Tensor = self.fpd.head.pre_squash(self.fpd.back(restored, around))
        return logits


def _joint(module: _Through, sign: float) -> LossFunction:
    """Cross-entropy plus the restoration loss (spoil the restoration too), or minus it (stay inconspicuous)."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        restoration, module.restoration = module.restoration, None
        assert restoration is not None  # of the forward pass that gave these logits
        return F.cross_entropy(logits, labels, reduction="none") + sign * JOINT_WEIGHT * restoration

    return loss
