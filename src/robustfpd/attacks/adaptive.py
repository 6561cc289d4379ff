"""Adaptive attacks: views of a classifier, which attacks differentiate instead of the classifier itself.

Athalye et al., "Obfuscated Gradients", ICML 2018; Carlini et al., "On Evaluating Adversarial Robustness", 2019;
Tramèr et al., "On Adaptive Attacks", NeurIPS 2020. An adversarial example found on a view counts only if the
classifier itself misclassifies it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.attacks.bpda import BPDA, non_differentiable_modules, straight_through
from robustfpd.attacks.half_precision import SinglePrecision
from robustfpd.attacks.losses import LossFunction
from robustfpd.models import FPD, FPDClassifier
from robustfpd.models.denoise import Bottleneck, NonLocal

LOGITS = "logits"
PRE_SQUASH = "pre-squash"
JOINT_WEIGHT = 10.0
"""Weight of the restoration loss (mean squared error, about 0.02) beside cross-entropy (of order 1)."""


@dataclass(frozen=True)
class View:
    """A module to attack instead of the classifier."""

    module: nn.Module
    """Images N×C×H×W → logits N×K."""
    loss: LossFunction | None = None
    """The loss to attack it with; None leaves the attack its own."""
    surrogate: bool = False
    """It is another network: what it misclassifies, the classifier may classify correctly."""


def views(classifier: nn.Module) -> dict[str, nn.Module]:
    """Return the classifier and, for an FPD whose head squashes its logits, the pre-squash logits, by name."""
    modules: dict[str, nn.Module] = {LOGITS: classifier}
    if isinstance(classifier, FPDClassifier) and classifier.squash and classifier.fpd.head.squashes:
        modules[PRE_SQUASH] = classifier.fpd.classifier(squash=False)
    return modules


def adaptive_views(classifier: nn.Module, images: Tensor) -> dict[str, View]:
    """Return all views of a classifier by name, the classifier itself first.

    For an FPD: the pre-squash logits; straight-through gradients past the restoration and past the denoising; the
    front pass and the back pass alone; cross-entropy plus and minus the restoration loss. For any other module:
    straight-through gradients past its non-differentiable submodules, which a pass of a few `images` finds.
    """
    if isinstance(classifier, SinglePrecision):
        dtype, found = classifier.dtype, adaptive_views(classifier.classifier, images.to(classifier.dtype))
        # A view with a loss of its own returns more to it than logits.
        return {n: replace(v, module=SinglePrecision(v.module, dtype, scaled=v.loss is None)) for n, v in found.items()}
    result = {name: View(module) for name, module in views(classifier).items()}
    if isinstance(classifier, FPDClassifier):
        return result | _fpd_views(classifier.fpd)
    try:
        blocking = non_differentiable_modules(classifier, images)
    except Exception:  # it accepts one batch size only, for example; the attack checks report such errors
        blocking = []
    if blocking:
        result["straight-through"] = View(BPDA(classifier, blocking))
    return result


def as_classifier(model: nn.Module) -> nn.Module:
    """Return the images → logits module of an FPD or baseline; any other module is returned as it is."""
    return model.classifier() if isinstance(model, FPD) else model


def _fpd_views(fpd: FPD) -> dict[str, View]:
    residual, middle = fpd.config.restoration == "residual", fpd.config.middle
    result = {"bpda-restoration": View(_FPDView(fpd, restored="identity"))}
    if not residual or any(bool(p.any()) for p in fpd.decoder.upscale[-1].parameters()):  # R is 0 at initialisation
        result["front-pass"] = View(_FPDView(fpd, detach_input=True, detach_skip=residual))
    # Around a residual restoration the gradient is that of `bpda-restoration`; without middle denoising of the input
    # nothing leads around x′ = R.
    if not residual and middle == "input":
        result["back-pass"] = View(_FPDView(fpd, restored="detached"))
    denoising = [m for m in fpd.modules() if isinstance(m, (NonLocal, Bottleneck))]
    if denoising or middle != "none":
        result["bpda-denoising"] = View(BPDA(_FPDView(fpd, constant_means=True), denoising))
    for name, sign in (("joint", 1.0), ("joint-hidden", -1.0)):
        module = _FPDView(fpd, joint=True)
        result[name] = View(module, _joint_loss(module, sign))
    return result


class _FPDView(nn.Module):
    """An FPD's pre-squash logits with other gradients; the forward pass is equal."""

    def __init__(
        self, fpd: FPD, *, restored: str = "exact", detach_input: bool = False, detach_skip: bool = False,
        constant_means: bool = False, joint: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.fpd = fpd
        self.restored, self.detach_input, self.joint = restored, detach_input, joint
        self.constant_means = constant_means
        self.detach_skip = detach_skip  # of a residual restoration x′ = x + R: differentiate R alone
        self.restoration_loss: Tensor | None = None
        """Of each image of the last batch, N, until the joint loss takes it: it holds the graph."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the pre-squash logits N×K of images N×C×H×W."""
        restored = self.fpd.restore(images)
        if self.joint:
            self.restoration_loss = F.mse_loss(restored, images, reduction="none").flatten(1).mean(dim=1)
        if self.detach_skip:
            restored = restored + (images.detach() - images)
        if self.restored == "detached":
            restored = restored.detach()
        elif self.restored == "identity":
            restored = straight_through(images, restored)
        middle_input = images.detach() if self.detach_input else images
        features = self.fpd.back(restored, middle_input, constant_means=self.constant_means)
        logits: Tensor = self.fpd.head.pre_squash(features)
        return logits


def _joint_loss(module: _FPDView, sign: float) -> LossFunction:
    """Cross-entropy plus the restoration loss (spoil the restoration too), or minus it (hide from it)."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        restoration, module.restoration_loss = module.restoration_loss, None
        assert restoration is not None  # set by the forward pass that computed the logits
        return F.cross_entropy(logits, labels, reduction="none") + sign * JOINT_WEIGHT * restoration

    return loss
