"""What stands between a classifier and the attack libraries, and what becomes of the points that they find."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustfpd.attacks.inputs import num_classes
from robustfpd.attacks.norms import LpBall
from robustfpd.attacks.query_counter import record_queries
from robustfpd.errors import InputError

Search = Callable[["ClassifierAdapter", Tensor, Tensor], Tensor]
LonelySearch = Callable[["BestAdversarial"], None]


class ClassifierAdapter(nn.Module):
    """A classifier for libraries: float32 images in, float32 logits out.

    The classifier is not a submodule, so that no library can move it, switch its mode or zero its gradients.
    """

    def __init__(self, classifier: nn.Module, images: Tensor, classes: int) -> None:
        super().__init__()
        self._classify: Callable[[Tensor], Tensor] = lambda x: classifier(x)
        self.dtype, self.device, self.classes = images.dtype, images.device, classes
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Classify images N×C×H×W: logits N×K, a tensor that the caller may overwrite."""
        logits = self._classify(images.to(self.device, self.dtype))
        if images.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
            raise InputError(
                "the classifier's logits do not depend differentiably on the images; use a black-box attack"
            )
        return logits.float().clone()


class QueryBudgetExceeded(Exception):
    """Ends a library's search from inside the classifier."""


class BestAdversarial(ClassifierAdapter):
    """A shield before an attack on one image; it remembers the closest misclassified image that passed.

    Libraries return their last iterate or the best in a measure of their own, forget points in between, and some
    of their loops have no end; the watch keeps what they found and ends the search when `queries` are spent.
    """

    def __init__(
        self, classifier: nn.Module, image: Tensor, label: Tensor, classes: int, space: LpBall, queries: int | None
    ) -> None:
        super().__init__(classifier, image, classes)
        self.image, self.label, self.space, self.limit = image, label, space, queries
        self.closest, self.closest_size, self.queries = image.clone(), float("inf"), 0

    def embed(self, inputs: Tensor) -> Tensor:
        """Images in [0, 1] of what the library moves."""
        return inputs

    def answer(self, logits: Tensor, images: Tensor) -> Tensor:
        """What the library is told."""
        return logits

    def forward(self, inputs: Tensor) -> Tensor:
        """Classify; inputs M×… of the library → M×K."""
        images = self.embed(inputs.to(self.device))
        if self.limit is not None and self.queries + len(images) > self.limit:
            raise QueryBudgetExceeded
        self.queries += len(images)
        logits = super().forward(images)
        self._look(images.detach().to(self.dtype), logits.detach())
        return self.answer(logits, images).to(inputs.device)  # ART's seeds of gradients lie where its images do

    def _look(self, images: Tensor, logits: Tensor) -> None:
        inside = ((images >= 0) & (images <= 1)).flatten(1).all(dim=1)
        wrong = (logits.argmax(dim=1) != self.label) & logits.isfinite().all(dim=1) & inside
        size = self.space.norm(images - self.image)
        size = torch.where(wrong, size, torch.inf)
        first = int(size.argmin())
        if float(size[first]) < self.closest_size:
            self.closest, self.closest_size = images[first : first + 1].clone(), float(size[first])


def misclassified(classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images a classifier puts into another class than their label: N booleans; NaN is no class."""
    with torch.no_grad():
        logits: Tensor = classifier(images)
    return (logits.argmax(dim=1) != labels) & logits.isfinite().all(dim=1)


def search_batch(classifier: nn.Module, images: Tensor, labels: Tensor, search: Search) -> Tensor:
    """Let a library search for the smallest perturbations of those images that are classified correctly.

    Args:
        classifier: images N×C×H×W in [0, 1] → logits N×K.
        images: N×C×H×W in [0, 1].
        labels: N.
        search: shield, images (float32), labels → points found; what is no find is sorted out here.

    Returns:
        N×C×H×W in [0, 1], in the dtype of the images: misclassified, or the image itself.
    """
    classes, result = num_classes(classifier, images, labels), images.clone()
    right = ~misclassified(classifier, images, labels)
    if bool(right.any()):
        x, y = images[right], labels[right]
        with torch.enable_grad():
            found = search(ClassifierAdapter(classifier, x, classes), x.float(), y)
        result[right] = settle(classifier, x, y, found)
    return result


def search_each(
    classifier: nn.Module, images: Tensor, labels: Tensor, space: LpBall, search: LonelySearch, *,
    queries: int | None = None, watch: type[BestAdversarial] = BestAdversarial,
) -> Tensor:  # fmt: skip
    """Like `search_batch`, but image by image, each with random states of its own: no image depends on another.

    Classifiers that count are told how many forward passes each image took.
    """
    classes, result = num_classes(classifier, images, labels), images.clone()
    salt = int(torch.randint(2**31, (1,)))
    spent = torch.ones(len(images), dtype=torch.long)
    for i in range(len(images)):
        image, label = images[i : i + 1], labels[i : i + 1]
        if bool(misclassified(classifier, image, label)):
            continue
        _seed(salt, image)
        view = watch(classifier, image, label, classes, space, queries)
        try:
            with torch.enable_grad():
                search(view)
        except QueryBudgetExceeded:
            pass
        result[i : i + 1] = settle(classifier, image, label, view.closest)
        spent[i] += view.queries
    record_queries(classifier, spent)
    return result


def settle(classifier: nn.Module, images: Tensor, labels: Tensor, found: Tensor) -> Tensor:
    """Keep found points that are misclassified and finite, in the images' own precision; else the image.

    A point on the boundary may fall back when it is rounded or classified in another batch; a step on of at most
    one percent brings it over again.
    """
    result = images.clone()
    delta = (found.detach().to(images) - images).nan_to_num(0, 0, 0)
    open_ = (delta != 0).flatten(1).any(dim=1)
    for stretch in (1.0, 1 + 1e-4, 1 + 1e-3, 1 + 1e-2):
        if not bool(open_.any()):
            break
        candidates = (images + stretch * delta).clamp(0, 1)
        hit = open_ & misclassified(classifier, candidates, labels)
        result[hit] = candidates[hit]
        open_ &= ~hit
    return result


def closer(space: LpBall, images: Tensor, best: Tensor, found: Tensor) -> Tensor:
    """Per image, the smaller of two perturbations; one that is nothing or not finite is no perturbation."""

    def size(points: Tensor) -> Tensor:
        delta = points - images
        is_one = (delta != 0).flatten(1).any(dim=1) & delta.flatten(1).isfinite().all(dim=1)
        return torch.where(is_one, space.norm(delta.nan_to_num()), torch.inf)

    return torch.where((size(found) < size(best)).reshape(-1, 1, 1, 1), found, best)


def _seed(salt: int, image: Tensor) -> None:
    """Random states that follow the image's content, not its place in a batch."""
    import numpy as np

    content = image.detach().to("cpu", torch.float32).numpy().tobytes()
    seed = int.from_bytes(hashlib.sha256(salt.to_bytes(8, "big") + content).digest()[:4], "big")
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries use this one
    random.seed(seed)
