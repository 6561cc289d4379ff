"""Arguments of the checks (CheckContext, AttackFindings), and functions that build their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.attacks.adaptive import PRE_SQUASH
from robustfpd.attacks.base import QueryCounter
from robustfpd.attacks.half_precision import SinglePrecision
from robustfpd.errors import first_line
from robustfpd.evaluation.attack_runner import AttackRunner
from robustfpd.evaluation.ledger import LedgerRow
from robustfpd.evaluation.record import AttackResult, Check, CheckOutcome
from robustfpd.evaluation.suites import AttackSpec
from robustfpd.rng import generator

NUM_IMAGES = 32  # images for the checks that run no attack
FIXES = {
    "training-mode": "call model.eval() before the evaluation; dropout that is the defence belongs in forward",
    "images-in-range": "divide by 255 once; torchvision's ToTensor already does",
    "stays-in-evaluation-mode": "let train(mode) set self.training and the mode of all children",
    "clean-accuracy": "check that the model is trained for these classes and its weights are loaded (missing keys)",
    "eps-units": "give eps in pixels of [0, 1]: eight grey levels are eps=8/255",
    "randomised-outputs": "disable the randomness, as in F.dropout(x, p, training=self.training); if it is the "
    "defence, report the average over draws",
    "finite-outputs": "find the layer (torch.autograd.set_detect_anomaly(True)): often a division by zero or log of 0",
    "squashed-outputs": "return the logits, without the last softmax, sigmoid or tanh",
    "batch-composition": "use running statistics (F.batch_norm(..., training=self.training)) and no means over dim 0",
    "wrapper-accuracy": "make forward independent of torch.is_grad_enabled(), and correct the wrapper",
    "vanishing-gradients": "remove no_grad, detach, numpy, argmax and round between images and logits; if one is the "
    "defence, put it in a submodule that keeps the shape, so that BPDA attacks it",
    "gradient-agreement": "look for a custom backward or a steep layer; also run attacks without gradients (square)",
    "gradient-stability": "attack a smoothed loss: remove what makes it rugged, or average gradients over noise",
    "single-step": "find the cause of the misleading gradients, or attack a surrogate with useful gradients",
    "random-noise": "find the cause of the misleading gradients, or attack a surrogate with useful gradients",
    "monotone-in-eps": "attack a smoothed loss: remove what makes it rugged, or average gradients over noise",
    "large-eps": "find why attacks fail although the ball contains every image, before you report a robust accuracy",
    "earlier-iterate": "keep the best iterate of an attack, not the last, and take smaller steps",
    "more-steps": "run the suite full, or attacks with more steps",
    "rugged-loss": "attack a smoothed loss: remove what makes it rugged, or average gradients over noise",
    "binarisation": "use stronger attacks (more steps, a margin loss), or find what masks the gradients",
    "black-box": "find what masks the gradients; until then report the lower robust accuracy",
    "failed-attacks": "fix the error in the ledger's column `note`, and evaluate again",
    "unchanged-state": "find the code that writes to parameters or buffers in evaluation mode, often batch statistics",
    "idle-attacks": "check the attack's settings, and that the classifier has gradients",
    "search-precision": "evaluate with search_precision=fp32",
    "complete": "repeat the evaluation in the same folder with a larger time limit or none: it goes on where it ended",
    "contradictions": "report the lower accuracy, and find which is wrong: repeat both with the same code and images; "
    "compare norm, eps and pixel range with those of the certificate",
}
"""What to do about each check of an evaluation that is not passed."""


class CheckContext:
    """A classifier under evaluation, with correctly classified images for the checks.

    Args:
        runner: attack runner of the evaluation, with its views.
        correct: which images are classified correctly, N.
        radii: radii above 0 of the evaluation, smallest first; there may be none.
        probes: number of images for the checks that run attacks.
    """

    def __init__(self, runner: AttackRunner, correct: Tensor, radii: Sequence[float], probes: int) -> None:
        self.runner, self.radii, self.norm, self.seed = runner, radii, runner.norm, runner.seed
        self.classifier = QueryCounter(runner.classifier)
        """Decides which images are misclassified."""
        self.has_pre_squash = PRE_SQUASH in runner.views
        self.white_box: nn.Module = runner.views[PRE_SQUASH].module if self.has_pre_squash else self.classifier
        """Module to differentiate: returns pre-squash logits where the classifier has them."""
        self.rounding = _rounding(runner.classifier, runner.images)
        """Relative rounding of the classifier's numbers: 1e-7 in float32, 1e-3 in float16, 8e-3 in bfloat16."""
        indices = torch.nonzero(correct).flatten()
        shuffled = indices[torch.randperm(len(indices), generator=generator(runner.seed, "probes"))]
        self.images, self.labels = self.take(shuffled[:NUM_IMAGES].sort().values)
        self.num_probes = probes
        """Number asked for; `probes` are fewer where fewer are classified correctly."""
        self.probes = self.take(shuffled[:probes].sort().values)
        """Images and labels for the checks that run attacks."""
        self.resume: Callable[[str, Callable[[], Any]], Any] = lambda name, compute: compute()
        """Returns the saved result of this name, or computes it; None after the evaluation's time limit."""

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return images and labels at `indices`, on the classifier's device."""
        runner = self.runner
        return runner.images[indices].to(runner.device), runner.labels[indices].to(runner.device)

    def generator(self, purpose: str) -> torch.Generator:
        """Return the random generator of one check."""
        return generator(self.seed, "check", purpose)


def _rounding(classifier: nn.Module, images: Tensor) -> float:
    """Return the rounding of the coarsest type among images and parameters."""
    dtypes = {p.dtype for p in classifier.parameters() if p.is_floating_point()} | {images.dtype}
    if isinstance(classifier, SinglePrecision):
        dtypes.add(classifier.dtype)
    return max(torch.finfo(dtype).eps for dtype in dtypes)


@dataclass(frozen=True)
class AttackFindings:
    """Results of the suite's attacks."""

    specs: Sequence[AttackSpec]
    rows: Sequence[LedgerRow]
    results: Sequence[AttackResult]
    robust: Tensor
    """Which images survived every attack, N."""
    margins: Tensor
    """Largest margin that an attack reached on each image, N; misclassified above 0."""
    classified: int = 0
    """Images that were classified without an attack; all unless the evaluation ended early."""
    ended: str = ""
    """Why the evaluation ended early; empty unless it did."""


def judge(
    name: str, bad: bool, evidence: str, fix: str = "", outcome: CheckOutcome = "suspicious", /, **values: float
) -> Check:  # fmt: skip
    """Return a check that passed; if `bad`, one with `outcome` and its fix (default: the one in `FIXES`)."""
    if not bad:
        return Check(name=name, outcome="passed", evidence=evidence, values=values)
    return Check(name=name, outcome=outcome, evidence=evidence, fix=fix or FIXES[name], values=values)


def skipped(name: str, reason: str) -> Check:
    """Return a check that was not made."""
    return Check(name=name, outcome="skipped", evidence=reason)


def is_random(checks: Sequence[Check]) -> bool:
    """Return whether the classifier's logits differ from pass to pass."""
    return any(c.name == "randomised-outputs" and c.outcome == "suspicious" for c in checks)


def run_check(name: str, check: Callable[[], Check]) -> Check:
    """Run one check; it is suspicious if the classifier raises an error."""
    try:
        return check()
    except Exception as error:  # a classifier may raise anything
        return judge(name, True, f"the check raised {type(error).__name__}: {first_line(error)}")
