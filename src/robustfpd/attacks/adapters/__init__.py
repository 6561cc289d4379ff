"""Adapters for attacks of other libraries: wrappers of the classifier, and confirmation of the results."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from robustfpd.attacks.base import check_differentiable, num_classes, record_queries
from robustfpd.attacks.norms import LpBall, per_image

BatchSearch = Callable[["ClassifierAdapter", Tensor, Tensor], Tensor]
"""A library's attack: adapter, images N×C×H×W (float32), labels N → candidates N×C×H×W."""
Search = Callable[["BestAdversarial"], None]
"""A library's attack on one image; the adapter remembers its result."""
STRETCHES = (1.0, 1 + 1e-4, 1 + 1e-3, 1 + 1e-2)
"""Factors by which a candidate's perturbation is multiplied until the image is misclassified."""


class ClassifierAdapter(nn.Module):
    """Present a classifier to an attack library: float32 images in, float32 logits out.

    The classifier is not a submodule, so no library can move it, change its mode or zero its gradients.
    """

    def __init__(self, classifier: nn.Module, images: Tensor, classes: int) -> None:
        super().__init__()
        self._classify: Callable[[Tensor], Tensor] = lambda x: classifier(x)
        self.dtype, self.device, self.classes = images.dtype, images.device, classes
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits N×K of images N×C×H×W, in a tensor that the library may overwrite."""
        logits = self._classify(images.to(self.device, self.dtype))
        if images.requires_grad and torch.is_grad_enabled():
            check_differentiable(logits)
        return logits.float().clone()


class QueryBudgetExceeded(Exception):
    """Ends a library's search from inside the classifier."""


class BestAdversarial(ClassifierAdapter):
    """Adapter for an attack on one image that remembers the closest misclassified image it has seen.

    Libraries return their last iterate or the best by another measure, forget points in between, and some of their
    loops do not end. `max_queries` bounds the forward passes; one more raises `QueryBudgetExceeded`.
    """

    def __init__(
        self, classifier: nn.Module, image: Tensor, label: Tensor, classes: int, ball: LpBall, max_queries: int | None
    ) -> None:
        super().__init__(classifier, image, classes)
        self.image, self.label, self.ball, self.max_queries = image, label, ball, max_queries
        self.best, self.best_norm, self.queries = image.clone(), float("inf"), 0

    def to_images(self, inputs: Tensor) -> Tensor:
        """Map the library's variables to images in [0, 1]."""
        return inputs

    def transform(self, logits: Tensor, images: Tensor) -> Tensor:
        """Map the classifier's logits to those the library receives."""
        return logits

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits M×K for the library's variables M×…."""
        images = self.to_images(inputs.to(self.device))
        if self.max_queries is not None and self.queries + len(images) > self.max_queries:
            raise QueryBudgetExceeded
        self.queries += len(images)
        logits = super().forward(images)
        self._remember(images.detach().to(self.dtype), logits.detach())
        return self.transform(logits, images).to(inputs.device)  # ART keeps gradient seeds on its images' device

    def _remember(self, images: Tensor, logits: Tensor) -> None:
        inside = ((images >= 0) & (images <= 1)).flatten(1).all(dim=1)
        success = (logits.argmax(dim=1) != self.label) & logits.isfinite().all(dim=1) & inside
        distance = torch.where(success, self.ball.norm(images - self.image), torch.inf)
        closest = int(distance.argmin())
        if float(distance[closest]) < self.best_norm:
            self.best, self.best_norm = images[closest : closest + 1].clone(), float(distance[closest])


def misclassified(classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return which images are misclassified, N booleans; images with NaN or infinite logits are not."""
    with torch.no_grad():
        logits: Tensor = classifier(images)
    return (logits.argmax(dim=1) != labels) & logits.isfinite().all(dim=1)


def minimize_batch(classifier: nn.Module, images: Tensor, labels: Tensor, search: BatchSearch) -> Tensor:
    """Minimize perturbations of the correctly classified images with a library's batch attack.

    The candidates of `search` need not be valid or misclassified. Returns N×C×H×W in [0, 1] and the images' dtype:
    misclassified, or the clean image.
    """
    classes, result = num_classes(classifier, images, labels), images.clone()
    correct = ~misclassified(classifier, images, labels)
    if bool(correct.any()):
        x, y = images[correct], labels[correct]
        with torch.enable_grad():
            candidates = search(ClassifierAdapter(classifier, x, classes), x.float(), y)
        result[correct] = confirm(classifier, x, y, candidates)
    return result


def minimize_each(
    classifier: nn.Module, images: Tensor, labels: Tensor, ball: LpBall, search: Search, *,
    max_queries: int | None = None, adapter: type[BestAdversarial] = BestAdversarial,
) -> Tensor:  # fmt: skip
    """Minimize as `minimize_batch` does, one image at a time, each with its own random state, in the norm of `ball`.

    Records the forward passes per image, at most `max_queries`; None sets no limit.
    """
    classes, result = num_classes(classifier, images, labels), images.clone()
    salt = int(torch.randint(2**31, (1,)))
    queries = torch.ones(len(images), dtype=torch.long)
    for i in range(len(images)):
        image, label = images[i : i + 1], labels[i : i + 1]
        if bool(misclassified(classifier, image, label)):
            continue
        _seed(salt, image)
        adapted = adapter(classifier, image, label, classes, ball, max_queries)
        with suppress(QueryBudgetExceeded), torch.enable_grad():
            search(adapted)
        result[i : i + 1] = confirm(classifier, image, label, adapted.best)
        queries[i] += adapted.queries
    record_queries(classifier, queries)
    return result


def confirm(classifier: nn.Module, images: Tensor, labels: Tensor, candidates: Tensor) -> Tensor:
    """Return the candidates that are misclassified in the images' dtype, and the clean images otherwise.

    A candidate on the decision boundary may be classified correctly after rounding or in another batch. Then its
    perturbation is lengthened by at most one percent.
    """
    result = images.clone()
    delta = (candidates.detach().to(images) - images).nan_to_num(0, 0, 0)
    remaining = (delta != 0).flatten(1).any(dim=1)
    for stretch in STRETCHES:
        if not bool(remaining.any()):
            break
        stretched = (images + stretch * delta).clamp(0, 1)
        success = remaining & misclassified(classifier, stretched, labels)
        result[success] = stretched[success]
        remaining &= ~success
    return result


def closer(ball: LpBall, images: Tensor, best: Tensor, candidates: Tensor) -> Tensor:
    """Return the smaller of two perturbations for each image; zero and non-finite ones do not count."""

    def distance(points: Tensor) -> Tensor:
        delta = points - images
        valid = (delta != 0).flatten(1).any(dim=1) & delta.flatten(1).isfinite().all(dim=1)
        return torch.where(valid, ball.norm(delta.nan_to_num()), torch.inf)

    return torch.where(per_image(distance(candidates) < distance(best)), candidates, best)


def _seed(salt: int, image: Tensor) -> None:
    """Seed the global random states from the image's content, so that they do not depend on its batch."""
    import numpy as np

    content = image.detach().to("cpu", torch.float32).numpy().tobytes()
    seed = int.from_bytes(hashlib.sha256(salt.to_bytes(8, "big") + content).digest()[:4], "big")
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries use this one
    random.seed(seed)
