"""Binary problems on the classifier's own features that are known to have an adversarial example.

Zimmermann, Brendel, Tramèr and Carlini, "Increasing Confidence in Adversarial Robustness Evaluations", NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustfpd.attacks.losses import margin
from robustfpd.attacks.norms import LpBall

INNER = 200
"""Random points of the ball that the read-out assigns to the image's class."""
INNER_RADIUS = 0.95
"""Radius of the inner points' ball, of eps."""
SURFACE = 100
"""Random points of the ball's surface, from which the known adversarial example is computed."""
FITTED = 8
"""How many of them the read-out is fitted to; the one that it separates best counts."""
RIDGE = 0.1
"""Regularization of the read-out, of the features' mean variance."""
CLOSENESS = 0.95
"""Where the threshold lies between the largest score of an inner point, 0, and that of the adversarial example, 1.

Close enough that only points as extreme solve the problem, and far enough that rounding does not.
"""
TINY = 1e-30


class BinaryProblems(nn.Module):
    """The classifier with one read-out per image in place of its last layer: images N×C×H×W → logits N×K.

    The read-out's score of the features takes the place of the label's logit (-score / 2) and of the target's
    (score / 2); the other logits are lower. What follows the last layer, a softmax for example, follows it still. Each
    input is scored by the read-out of the nearest of the images, which are more than 2·eps apart.

    Args:
        classifier: images N×C×H×W in [0, 1] → logits N×K.
        layer: the last layer, features N×D → logits N×K; None reads the classifier's output as features.
        images: M×C×H×W, labels and targets: M.
        scale: margin of the clean images, the classifier's own.
        ball: of the evaluation's norm.
    """

    def __init__(
        self, classifier: nn.Module, layer: nn.Linear | None, images: Tensor, labels: Tensor, targets: Tensor,
        scale: float, ball: LpBall,
    ) -> None:  # fmt: skip
        super().__init__()
        self.classifier, self.ball, self.scale = classifier, ball, scale
        self.layer = (layer,)  # a tuple: it is a submodule of the classifier already
        self.images, self.labels, self.targets = images, labels, targets
        self.weights = torch.zeros(len(images), 1, device=images.device)
        self.biases = torch.full((len(images),), -scale, device=images.device)

    def set_readouts(self, weights: Tensor, biases: Tensor) -> None:
        """Set the read-outs: weights M×D, or M×1 for one weight of all features, and biases M."""
        self.weights, self.biases = weights, biases

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits N×K of the read-outs."""
        (layer,) = self.layer
        if layer is None:
            output: Tensor = self.classifier(images)
            return self._logits(images, output, output)
        hook = layer.register_forward_hook(lambda module, args, output: self._logits(images, args[0], output))
        try:
            logits: Tensor = self.classifier(images)
        finally:
            hook.remove()
        return logits

    def _logits(self, images: Tensor, features: Tensor, output: Tensor) -> Tensor:
        """Return logits N×K, as the layer's `output`, from features N×D."""
        with torch.no_grad():
            apart = torch.stack([self.ball.norm(images.float() - image.float()) for image in self.images])  # M N
            nearest = apart.argmin(dim=0)
        score = (features.float() * self.weights[nearest]).sum(dim=1) + self.biases[nearest]
        score = score.to(output.dtype)
        logits = torch.full_like(output, -self.scale)
        logits = logits.scatter(1, self.labels[nearest].unsqueeze(1), -score.unsqueeze(1) / 2)
        return logits.scatter(1, self.targets[nearest].unsqueeze(1), score.unsqueeze(1) / 2)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the features N×D, on the CPU in float64."""
        (layer,) = self.layer
        if layer is None:
            output: Tensor = self.classifier(images)
            return output.cpu().double()
        with _inputs(layer) as found:
            self.classifier(images)
        return found[-1].cpu().double()


@dataclass(frozen=True)
class Readout:
    """A linear read-out of features, and a point that it assigns to the other class."""

    weight: Tensor
    """D, float64."""
    bias: float
    solution: Tensor
    """The known adversarial example, C×H×W."""


def fit_readout(
    features: Callable[[Tensor], Tensor], image: Tensor, ball: LpBall, eps: float, scale: float,
    draws: torch.Generator,
) -> Readout | None:  # fmt: skip
    """Fit a read-out to one image: it separates random points of the ball from one extreme point of its surface.

    Of random points on the surface, the read-out is fitted to the one that it separates best (linear discriminant).
    The known adversarial example is the surface point in the direction in which scores rise on average over all of
    them, or the one with the largest score if that is larger. No gradient is used, so that it exists also where
    gradients are masked.

    Args:
        features: images N×C×H×W → features N×D, on the CPU in float64.
        image: C×H×W.
        ball: of the norm.
        eps: radius.
        scale: margin of the image under the read-out.
        draws: generator of the points.

    Returns:
        None if the features do not separate any of the points from the inner ones.
    """
    x = image.unsqueeze(0)
    repeated = x.expand(INNER, *image.shape)
    inner = torch.cat([x, (repeated + ball.sample(repeated, INNER_RADIUS * eps, draws)).clamp(0, 1)])
    surface = surface_points(x.expand(SURFACE, *image.shape), ball, eps, draws)
    inner_features, surface_features = features(inner), features(surface)
    if not bool(inner_features.isfinite().all() and surface_features.isfinite().all()):
        return None
    mean = inner_features.mean(dim=0)
    weight = _separating_direction(inner_features - mean, surface_features[:FITTED] - mean)
    scores, largest = (surface_features - mean) @ weight, float(((inner_features - mean) @ weight).max())
    ascent = torch.einsum("n,nchw->chw", (scores - scores.mean()).to(x), surface - x).unsqueeze(0)
    improved = x + ball.project(ball.normalize(ascent) * eps, x, eps)
    candidates = torch.cat([improved.clamp(0, 1), surface[scores.argmax()].unsqueeze(0)])
    reached = torch.cat([(features(candidates[:1]) - mean) @ weight, scores.max().unsqueeze(0)])
    best = int(reached.argmax())
    threshold = largest + CLOSENESS * (float(reached[best]) - largest)
    clean = float((inner_features[0] - mean) @ weight)
    if not (float(reached[best]) > largest and threshold - clean > TINY):
        return None
    factor = scale / (threshold - clean)
    return Readout(factor * weight, -factor * (threshold + float(mean @ weight)), candidates[best])


def surface_points(images: Tensor, ball: LpBall, eps: float, draws: torch.Generator) -> Tensor:
    """Return a random point of each ball's surface, projected onto the box."""
    direction = ball.normalize(ball.sample(images, eps, draws))
    return (images + ball.project(eps * direction, images, eps)).clamp(0, 1)


def last_layer(classifier: nn.Module, images: Tensor) -> tuple[nn.Linear, Tensor] | None:
    """Return the linear layer that computes the logits in a pass of `images`, and its output N×K.

    None if there is none, if a pass calls it more than once, or if its features are not N×D.
    """
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    layers = [m for m in classifier.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, args, output: calls.append((m, args[0], output))) for m in layers]
    try:
        with torch.no_grad():
            classes = classifier(images).shape[1]
    finally:
        for hook in hooks:
            hook.remove()
    calls = [call for call in calls if call[0].out_features == classes]
    if not calls:
        return None
    layer, features, output = calls[-1]
    assert isinstance(layer, nn.Linear)
    once = sum(called is layer for called, _, _ in calls) == 1
    return (layer, output) if once and features.ndim == 2 and len(features) == len(images) else None


def typical_margin(logits: Tensor, labels: Tensor) -> float:
    """Return the median margin of logits N×K, the true one minus the largest wrong one; not below a tiny number."""
    return max(float(-margin(logits.float(), labels).median()), TINY)


def _separating_direction(inner: Tensor, points: Tensor) -> Tensor:
    """Return the weights D of the linear discriminant between inner points N×D, centred, and one of `points` M×D.

    Of the discriminants of all points, the one with the largest gap between its point and the inner points, relative
    to the score of its point.
    """
    count, dimension = inner.shape
    ridge = RIDGE * inner.square().sum() / min(count, dimension) + TINY
    identity = torch.eye(min(count, dimension), dtype=inner.dtype)
    if dimension <= count:
        weights = torch.linalg.solve(inner.T @ inner + ridge * identity, points.T).T  # M D
    else:  # the same, from the smaller Gram matrix
        dual = torch.linalg.solve(inner @ inner.T + ridge * identity, inner @ points.T)  # N M
        weights = (points - dual.T @ inner) / ridge
    scores = (weights * points).sum(dim=1)
    gaps = (scores - (weights @ inner.T).amax(dim=1)) / scores.clamp_min(TINY)
    best: Tensor = weights[int(gaps.argmax())]
    return best


@contextmanager
def _inputs(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of a layer."""
    found: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
    try:
        yield found
    finally:
        hook.remove()
