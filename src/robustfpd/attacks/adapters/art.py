"""The Adversarial Robustness Toolbox's JSMA, ZOO, HopSkipJump and C&W (L∞), one image at a time.

Papernot et al., EuroS&P 2016; Chen et al., AISec 2017; Chen et al., S&P 2020; Carlini & Wagner, S&P 2017.

Results are the closest misclassified images that the classifier has seen, see `BestAdversarial`, not ART's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.attacks.adapters import BestAdversarial, QueryBudgetExceeded, minimize_each, misclassified
from robustfpd.attacks.base import attack, check_positive
from robustfpd.attacks.norms import lp_ball, per_image
from robustfpd.config import Norm
from robustfpd.errors import InputError

ZOO_OPTIONS = {"learning_rate": 0.05, "binary_search_steps": 6, "initial_const": 0.1, "variable_h": 1e-2}
"""Length of a pixel's step, constants tried per image, the first of them, half the width of a finite difference."""
HOPSKIPJUMP_STARTS = 100
"""Images of noise tried as starting points, before plain ones."""


@attack("jsma", norms=("l1", "l2"), minimal=True, library="art")
def jsma(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "l1", theta: float = 0.1,
    targets: int = 9, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Jacobian saliency map: change pixels in pairs towards one class after the other (Papernot et al., 2016).

    Unlike the original it lowers pixels as well as raising them. Few pixels change, and by much: small in L1, not in
    L2. Arguments, result and errors as in `pgd`; `eps` is not used.

    Options:
        theta: how far a pixel moves in one step, in (0, 1].
        targets: wrong classes to try, most likely first, at most K - 1.
    """
    from art.attacks.evasion import SaliencyMapMethod

    check_positive(theta=theta, targets=targets)
    if theta > 1:
        raise InputError(f"theta must be at most 1, found {theta}")
    _, channels, height, width = images.shape

    def search(adapter: BestAdversarial) -> None:
        start = np.zeros((1, 2 * channels, height, width), dtype=np.float32)
        # Half of its channels: all pixels of the image may change.
        library_attack = SaliencyMapMethod(_estimator(adapter, start.shape[1:]), theta=theta, gamma=0.5, verbose=False)
        ranking = classifier(adapter.image)[0].argsort(descending=True).tolist()
        for target in [k for k in ranking if k != int(adapter.label)][:targets]:
            with suppress(_NotCloser):
                library_attack.generate(start, np.array([target]))

    adversarial = minimize_each(classifier, images, labels, lp_ball(norm), search, adapter=_RaiseAndLower)
    return _shorten(classifier, images, labels, adversarial)


@attack("zoo", norms=("l2",), minimal=True, access="scores", library="art")
def zoo(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "l2", steps: int = 100,
    coordinates: int = 128, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Zeroth-order optimisation: C&W with gradients from finite differences (Chen et al., AISec 2017).

    Takes about 2·coordinates·steps·6 queries per image and records them. Arguments, result and errors as in `pgd`;
    `eps` is not used.

    Options:
        steps: steps per constant; six constants are tried.
        coordinates: pixels that move in one step, at most all.
    """
    from art.attacks.evasion import ZooAttack

    check_positive(steps=steps, coordinates=coordinates)

    def search(adapter: BestAdversarial) -> None:
        x = adapter.image.float().cpu().numpy()
        # ART clips the perturbation instead of the image to the bounds: without bounds pixels can also become darker.
        library_attack = ZooAttack(
            _estimator(adapter, x.shape[1:], bounds=None), confidence=0.0, max_iter=steps, abort_early=False,
            use_resize=False, use_importance=False, nb_parallel=min(coordinates, x.size), verbose=False, **ZOO_OPTIONS,
        )  # fmt: skip
        # ART adds the whole perturbation to the last iterate, in every step, instead of to the image.
        optimize = library_attack._optimizer
        library_attack._optimizer = lambda _, targets, consts: optimize(x, targets, consts)
        library_attack.batch_size = 2 * library_attack.nb_parallel  # of the classifier
        library_attack._generate_batch(x, _one_hot(adapter))

    return minimize_each(classifier, images, labels, lp_ball(norm), search, adapter=_Clamped)


@attack("hopskipjump", norms=("linf", "l2"), minimal=True, access="decisions", library="art")
def hopskipjump(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", queries: int = 25000,
    steps: int = 64, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """HopSkipJump: walk along the decision boundary by predicted classes alone (Chen et al., S&P 2020).

    Records the queries per image. Arguments, result and errors as in `pgd`; `eps` is not used.

    Options:
        queries: forward passes per image, at most.
        steps: steps along the boundary.
    """
    from art.attacks.evasion import HopSkipJump

    check_positive(queries=queries, steps=steps)

    def search(adapter: BestAdversarial) -> None:
        start = _starting_point(adapter)
        if start is None:
            return
        library_attack = HopSkipJump(
            _estimator(adapter, start.shape[1:]), batch_size=512, norm=2 if norm == "l2" else np.inf, max_iter=steps,
            max_eval=10000, init_eval=100, verbose=False,
        )  # fmt: skip
        # ART tests a float64 point and returns its float32 neighbour, which may lie on the other side of the boundary;
        # then it halves its step for ever.
        interpolate = library_attack._interpolate
        library_attack._interpolate = lambda current_sample, original_sample, alpha, norm: np.asarray(
            interpolate(current_sample, original_sample, float(alpha), norm), dtype=np.float32
        )
        library_attack.generate(adapter.image.float().cpu().numpy(), x_adv_init=start)

    return minimize_each(classifier, images, labels, lp_ball(norm), search, max_queries=queries)


def cw_linf(classifier: nn.Module, images: Tensor, labels: Tensor, step_size: float, **options: Any) -> Tensor:
    """Carlini & Wagner in L∞, see `cw`; `options` are those of ART's `CarliniLInfMethod`."""
    from art.attacks.evasion import CarliniLInfMethod

    def search(adapter: BestAdversarial) -> None:
        assert isinstance(adapter, _Hinge)
        adapter.confidence = options["confidence"]
        x = adapter.image.float().cpu().numpy()
        library_attack = CarliniLInfMethod(
            _estimator(adapter, x.shape[1:], bounds=(-1.0, 2.0)), const_factor=10.0, verbose=False, **options
        )
        # ART leaves the constant out of the gradient, so the adapter multiplies its logits by it. One step size for
        # all limits would be too long for the small ones.
        generate_single = library_attack._generate_single

        def generate(x: Any, y: Any, low: Any, high: Any, const: float, tau: float) -> Any:
            adapter.const, library_attack.learning_rate = const, step_size * min(tau, 1.0)
            try:
                return generate_single(x, y, low, high, 1.0, tau)
            finally:
                adapter.const = 1.0

        library_attack._generate_single = generate
        library_attack.generate(x, _one_hot(adapter))

    return minimize_each(classifier, images, labels, lp_ball("linf"), search, adapter=_Hinge)


class _NotCloser(QueryBudgetExceeded):
    """JSMA's perturbation exceeds the smallest one so far."""


class _RaiseAndLower(BestAdversarial):
    """JSMA's adapter: it raises 2C channels from zero, of which C raise and C lower the image's own.

    Its saliency uses the target's logit alone; as a log-probability that also rises when the other logits fall.
    """

    def to_images(self, inputs: Tensor) -> Tensor:
        """Return image + raised - lowered."""
        raised, lowered = inputs.chunk(2, dim=1)  # 1 2C H W → two of 1 C H W
        return (self.image.float() + raised - lowered).clamp(0, 1)

    def transform(self, logits: Tensor, images: Tensor) -> Tensor:
        """Return log-probabilities; raise `_NotCloser` if a closer adversarial image is known."""
        if float(self.ball.norm(images.detach() - self.image).max()) > self.best_norm:
            raise _NotCloser
        return logits.log_softmax(dim=1)


class _Clamped(BestAdversarial):
    """ZOO's adapter: clamp to [0, 1]."""

    def to_images(self, inputs: Tensor) -> Tensor:
        """Return the nearest image."""
        return inputs.clamp(0, 1)


class _Hinge(BestAdversarial):
    """C&W's adapter: logits times the constant, without gradient once the margin is reached.

    ART applies the hinge to the loss but not to the gradient, and would not stop moving.
    """

    const, confidence = 1.0, 0.0

    def to_images(self, inputs: Tensor) -> Tensor:
        """Return the nearest image, with the gradient of the identity.

        With bounds of exactly [0, 1] ART's tanh would hardly move pixels at 0 and 1.
        """
        return inputs.detach().clamp(0, 1) + (inputs - inputs.detach())

    def transform(self, logits: Tensor, images: Tensor) -> Tensor:
        """Return const·logits; their gradient is zero where the wrong class wins by more than the confidence."""
        true = logits[:, self.label].flatten()
        others = logits.index_fill(1, self.label, -math.inf).amax(dim=1)
        done = (others - true).detach() > self.confidence
        # Zero times the logits, not a detached copy: ART differentiates in any case.
        return logits * self.const * torch.where(done, 0.0, 1.0)[:, None] + torch.where(
            done[:, None], logits.detach() * self.const, 0.0
        )


def _estimator(
    adapter: BestAdversarial, shape: tuple[int, ...], bounds: tuple[float, float] | None = (0.0, 1.0)
) -> Any:
    """Return ART's classifier around an adapter.

    ART moves a module to the device it is given; the adapter has no parameters, and moves the images itself.
    """
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        adapter, nn.CrossEntropyLoss(), input_shape=tuple(shape), nb_classes=adapter.classes, clip_values=bounds,
        device_type="cpu",
    )  # fmt: skip


def _one_hot(adapter: BestAdversarial) -> Any:
    return F.one_hot(adapter.label, adapter.classes).float().cpu().numpy()


def _starting_point(adapter: BestAdversarial) -> Any:
    """Return a misclassified image as an array, or None. ART draws its own from a random state that no seed reaches."""
    for candidate in _starting_points(adapter.image.float()):
        with torch.no_grad():
            if bool(adapter(candidate).argmax(dim=1) != adapter.label):
                return candidate.cpu().numpy()
    return None


def _starting_points(x: Tensor) -> Iterator[Tensor]:
    """Yield noise, then the inverted image, black, white and binary noise."""
    for _ in range(HOPSKIPJUMP_STARTS):
        yield torch.rand(x.shape).to(x)
    yield from (1 - x, torch.zeros_like(x), torch.ones_like(x), torch.rand(x.shape).to(x).round())


def _shorten(classifier: nn.Module, images: Tensor, labels: Tensor, adversarial: Tensor) -> Tensor:
    """Shorten perturbations by bisection while the images stay misclassified; JSMA's steps of theta overshoot."""
    low = torch.zeros(len(images), dtype=images.dtype, device=images.device)
    high = torch.ones_like(low)
    delta = adversarial - images
    for _ in range(8):
        middle = (low + high) / 2
        success = misclassified(classifier, images + per_image(middle) * delta, labels)
        low, high = torch.where(success, low, middle), torch.where(success, middle, high)
    shorter = (images + per_image(high) * delta).clamp(0, 1)
    better = misclassified(classifier, shorter, labels) & (delta != 0).flatten(1).any(dim=1)
    return torch.where(per_image(better), shorter, adversarial)
