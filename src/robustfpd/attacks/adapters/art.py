"""The Adversarial Robustness Toolbox's attacks: C&W in L∞, JSMA, ZOO and HopSkipJump, each image by image.

Carlini & Wagner, S&P 2017; Papernot et al., EuroS&P 2016; Chen et al., AISec 2017; Chen et al., S&P 2020.

What is found is what the classifier was shown: see `BestAdversarial`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.attacks.adapters.base import BestAdversarial, QueryBudgetExceeded, misclassified, search_each
from robustfpd.attacks.base import attack
from robustfpd.attacks.inputs import positive
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Norm
from robustfpd.errors import InputError


@attack("jsma", norms=("l1", "l2"), minimal=True, library="art")
def jsma(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "l1", theta: float = 0.1,
    gamma: float = 1.0, targets: int = 9, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Jacobian saliency map: change pixels two by two towards one class after the other (Papernot et al., 2016).

    Unlike the original it lowers pixels as well as raising them. Few pixels change, and by much: small in L1, not in
    L2. Arguments, result and errors as in `pgd`; `eps` is not used.

    Options:
        theta: how far a pixel moves in one step.
        gamma: fraction of the pixels that may change, in (0, 1].
        targets: wrong classes to try, likeliest first; at most K - 1 are.
    """
    from art.attacks.evasion import SaliencyMapMethod

    positive(theta=theta, gamma=gamma, targets=targets)
    if theta > 1 or gamma > 1:
        raise InputError(f"theta and gamma must be at most 1, found theta={theta}, gamma={gamma}")
    _, channels, height, width = images.shape

    def search(view: BestAdversarial) -> None:
        assert isinstance(view, _UpAndDown)
        start = np.zeros((1, 2 * channels, height, width), dtype=np.float32)
        peer = SaliencyMapMethod(_estimator(view, start.shape[1:]), theta=theta, gamma=gamma / 2, verbose=False)
        likeliest = classifier(view.image)[0].argsort(descending=True).tolist()
        order = [k for k in likeliest if k != int(view.label)]
        for target in order[:targets]:
            try:
                peer.generate(start, np.array([target]))
            except _TooFarError:
                continue

    found = search_each(classifier, images, labels, lp_ball(norm), search, watch=_UpAndDown)
    return _shortened(classifier, images, labels, found)


@attack("zoo", norms=("l2",), minimal=True, access="scores", library="art")
def zoo(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "l2", steps: int = 100,
    step_size: float = 0.05, binary_search_steps: int = 6, initial_const: float = 0.1, confidence: float = 0.0,
    coordinates: int = 128, difference: float = 1e-2, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Zeroth-order optimisation: C&W with gradients from finite differences (Chen et al., AISec 2017).

    Takes about 2·coordinates·steps·binary_search_steps queries per image; counting classifiers are told how many.
    Arguments, result and errors as in `pgd`; `eps` is not used.

    Options:
        steps: steps per constant.
        step_size: how far a pixel moves in one step (Adam's learning rate).
        binary_search_steps: constants tried per image.
        initial_const: first weight of misclassification against distance.
        confidence: margin by which the wrong class must win.
        coordinates: pixels that move in one step; at most all do.
        difference: half the distance between the two points of a finite difference.
    """
    from art.attacks.evasion import ZooAttack

    positive(
        steps=steps, step_size=step_size, binary_search_steps=binary_search_steps, initial_const=initial_const,
        coordinates=coordinates, difference=difference,
    )  # fmt: skip

    def search(view: BestAdversarial) -> None:
        x = view.image.float().cpu().numpy()
        # Theirs clips the perturbation, not the image, to the box: without bounds pixels can fall as well as rise.
        peer = ZooAttack(
            _estimator(view, x.shape[1:], bounds=None), confidence=confidence, learning_rate=step_size, max_iter=steps,
            binary_search_steps=binary_search_steps, initial_const=initial_const, abort_early=False, use_resize=False,
            use_importance=False, nb_parallel=min(coordinates, x.size), variable_h=difference, verbose=False,
        )  # fmt: skip
        # Theirs adds the whole perturbation to the last iterate instead of the image, again in every step.
        step = peer._optimizer
        peer._optimizer = lambda _, targets, consts: step(x, targets, consts)
        peer.batch_size = 2 * peer.nb_parallel  # this one is the classifier's
        peer._generate_batch(x, _one_hot(view))

    return search_each(classifier, images, labels, lp_ball(norm), search, watch=_Clamped)


@attack("hopskipjump", norms=("linf", "l2"), minimal=True, access="decisions", library="art")
def hopskipjump(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", queries: int = 25000,
    steps: int = 64, init_queries: int = 100, init_tries: int = 100, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """HopSkipJump: along the boundary, by predicted classes alone (Chen et al., S&P 2020).

    Counting classifiers are told the queries of each image. Arguments, result and errors as in `pgd`; `eps` is not
    used.

    Options:
        queries: forward passes per image at most.
        steps: steps along the boundary.
        init_queries: queries for the first estimate of the boundary's direction; the k-th takes √k times as many.
        init_tries: images of noise tried as starting points, before plain ones.
    """
    from art.attacks.evasion import HopSkipJump

    positive(queries=queries, steps=steps, init_queries=init_queries, init_tries=init_tries)

    def search(view: BestAdversarial) -> None:
        start = _start(view, init_tries)
        if start is None:
            return
        peer = HopSkipJump(
            _estimator(view, start.shape[1:]), batch_size=512, norm=2 if norm == "l2" else np.inf, max_iter=steps,
            max_eval=max(10000, init_queries), init_eval=init_queries, verbose=False,
        )  # fmt: skip
        # Theirs tests a float64 point and returns its float32 neighbour, which may be on the other side; then it
        # halves its step for ever.
        blend = peer._interpolate
        peer._interpolate = lambda current_sample, original_sample, alpha, norm: np.asarray(
            blend(current_sample, original_sample, float(alpha), norm), dtype=np.float32
        )
        peer.generate(view.image.float().cpu().numpy(), x_adv_init=start)

    return search_each(classifier, images, labels, lp_ball(norm), search, queries=queries)


def cw_linf(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, steps: int, step_size: float, confidence: float,
    initial_const: float, largest_const: float, decrease_factor: float,
) -> Tensor:  # fmt: skip
    """Carlini & Wagner in L∞; see `cw`."""
    from art.attacks.evasion import CarliniLInfMethod

    def search(view: BestAdversarial) -> None:
        assert isinstance(view, _Hinge)
        view.confidence = confidence
        x = view.image.float().cpu().numpy()
        peer = CarliniLInfMethod(
            _estimator(view, x.shape[1:], bounds=(-1.0, 2.0)), confidence=confidence, max_iter=steps,
            decrease_factor=decrease_factor, initial_const=initial_const, largest_const=largest_const,
            const_factor=10.0, verbose=False,
        )  # fmt: skip
        # Theirs leaves the constant out of the gradient; the view multiplies its logits by it instead. One length of
        # steps for all limits would be too long for the small ones.
        single = peer._generate_single

        def generate(x: Any, y: Any, low: Any, high: Any, const: float, tau: float) -> Any:
            view.const, peer.learning_rate = const, step_size * min(tau, 1.0)
            try:
                return single(x, y, low, high, 1.0, tau)
            finally:
                view.const = 1.0

        peer._generate_single = generate
        peer.generate(x, _one_hot(view))

    return search_each(classifier, images, labels, lp_ball("linf"), search, watch=_Hinge)


class _TooFarError(QueryBudgetExceeded):
    """What JSMA has changed is more than what sufficed for another class."""


class _UpAndDown(BestAdversarial):
    """JSMA's view: it raises 2C channels from zero, of which C raise and C lower the image's own.

    Its saliency looks at the target's logit alone; as a log-probability that rises when the other logits fall.
    """

    def embed(self, inputs: Tensor) -> Tensor:
        """Image + up - down."""
        up, down = inputs.chunk(2, dim=1)
        return (self.image.float() + up - down).clamp(0, 1)

    def answer(self, logits: Tensor, images: Tensor) -> Tensor:
        """Log-probabilities, unless a closer image is known."""
        if float(self.space.norm(images.detach() - self.image).max()) > self.closest_size:
            raise _TooFarError
        return logits.log_softmax(dim=1)


class _Clamped(BestAdversarial):
    """Brings whatever it is given into the box."""

    def embed(self, inputs: Tensor) -> Tensor:
        """Nearest image."""
        return inputs.clamp(0, 1)


class _Hinge(BestAdversarial):
    """C&W's view: logits times the constant, without gradient once the margin is reached.

    Theirs has the hinge in its loss but not in the gradient, and would push on for ever.
    """

    const, confidence = 1.0, 0.0

    def embed(self, inputs: Tensor) -> Tensor:
        """Nearest image, with the gradient of the identity.

        In [0, 1] proper their tanh would hardly move pixels at 0 and 1.
        """
        return inputs.detach().clamp(0, 1) + (inputs - inputs.detach())

    def answer(self, logits: Tensor, images: Tensor) -> Tensor:
        """Logits that pull only as long as the wrong class does not win by the confidence."""
        true = logits[:, self.label].flatten()
        others = logits.index_fill(1, self.label, -math.inf).amax(dim=1)
        done = (others - true).detach() > self.confidence
        # A zero times the logits, not a detached copy: theirs differentiates in any case.
        return logits * self.const * torch.where(done, 0.0, 1.0)[:, None] + torch.where(
            done[:, None], logits.detach() * self.const, 0.0
        )


def _estimator(view: BestAdversarial, shape: tuple[int, ...], bounds: tuple[float, float] | None = (0.0, 1.0)) -> Any:
    """ART's classifier around a view.

    It would move a module to the device that it is told; the view has none to move, and moves the images itself.
    """
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        view, nn.CrossEntropyLoss(), input_shape=tuple(shape), nb_classes=view.classes, clip_values=bounds,
        device_type="cpu",
    )  # fmt: skip


def _one_hot(view: BestAdversarial) -> Any:
    return F.one_hot(view.label, view.classes).float().cpu().numpy()


def _start(view: BestAdversarial, tries: int) -> Any:
    """A misclassified image: noise, else the image reversed, black, white or halves of these; None if all are right.

    Theirs draws it from a state that no seed reaches.
    """
    x = view.image.float()
    for _ in range(tries):
        noise = torch.rand(x.shape).to(x)
        if _wrong(view, noise):
            return noise.cpu().numpy()
    for plain in (1 - x, torch.zeros_like(x), torch.ones_like(x), torch.rand(x.shape).to(x).round()):
        if _wrong(view, plain):
            return plain.cpu().numpy()
    return None


def _wrong(view: BestAdversarial, image: Tensor) -> bool:
    with torch.no_grad():
        return bool(view(image).argmax(dim=1) != view.label)


def _shortened(classifier: nn.Module, images: Tensor, labels: Tensor, found: Tensor) -> Tensor:
    """Go back towards the images as far as the class stays wrong; steps of theta overshoot."""
    low = torch.zeros(len(images), dtype=images.dtype, device=images.device)
    high = torch.ones_like(low)
    for _ in range(8):
        middle = (low + high) / 2
        candidates = images + middle.reshape(-1, 1, 1, 1) * (found - images)
        wrong = misclassified(classifier, candidates, labels)
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
    shorter = (images + high.reshape(-1, 1, 1, 1) * (found - images)).clamp(0, 1)
    better = misclassified(classifier, shorter, labels) & (found != images).flatten(1).any(dim=1)
    return torch.where(better.reshape(-1, 1, 1, 1), shorter, found)
