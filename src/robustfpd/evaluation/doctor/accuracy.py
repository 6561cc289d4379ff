"""Why a classifier is worse than it could be: other pixels than it learned from, or labels in another order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robustfpd.evaluation.checks.inputs import clean_accuracy
from robustfpd.evaluation.doctor.finding import Finding, Patient, found, skipped, told

NORMALISATION, ORDER, LABELS, ACCURACY = "normalisation", "channel-order", "label-order", "clean-accuracy"
MANY = 20
"""Fewer images do not tell one explanation from another."""
LEAST = 0.05
"""Share of the images that an explanation must gain."""
SIGMAS = 3
"""Standard deviations that it must gain over chance: of images which only one of two ways gets right, each way gets
half by chance."""
SHORT = 20
"""Classes whose order is written out."""
Explanation = tuple[Finding, int]
"""With the images that would be classified correctly beside those that are; 0 where it explains nothing."""
_STATISTICS = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "MNIST": ((0.1307,), (0.3081,)),
    "[-1, 1]": ((0.5,), (0.5,)),
}
"""Mean and std that classifiers are often trained with."""


def accuracy(patient: Patient) -> list[Finding]:
    """Is it better than chance, and would other pixels or another order of the labels make it clearly better?"""
    count, right = len(patient.labels), patient.predictions == patient.labels
    plain = told(
        clean_accuracy(patient.subject(patient.labels)),
        "is it trained, for these classes, and are its weights loaded (load_state_dict's missing keys)?",
    )
    if count < MANY:
        few = f"{count} images are too few to tell, {MANY} are needed"
        return [plain, *(Finding(name=n, outcome="skipped", evidence=few) for n in (NORMALISATION, ORDER, LABELS))]
    explanations = [
        normalisation(patient, right),
        channel_order(patient, right),
        label_order(patient.logits.shape[1], patient.predictions, patient.labels),
    ]
    best, gained = max(explanations, key=lambda explanation: explanation[1])
    if not gained:
        return [plain, *(finding for finding, _ in explanations)]
    evidence = f"{plain.evidence}, which {best.name} explains"
    return [
        Finding(name=ACCURACY, outcome="skipped", evidence=evidence),
        *(finding if finding is best else skipped(finding.name, [best.name]) for finding, _ in explanations),
    ]


def normalisation(patient: Patient, right: Tensor) -> Explanation:
    """Does it expect pixels on another scale?"""
    x = patient.images
    ways: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {}
    for name, (mean, std) in _STATISTICS.items():
        if len(mean) in (1, x.shape[1]):
            ways[f"normalised as {name}"] = _normaliser(mean, std)
    own = x.mean(dim=(0, 2, 3)).tolist(), x.std(dim=(0, 2, 3)).clamp_min(1e-4).tolist()
    ways["normalised by their own mean and std"] = _normaliser(*own)
    ways["in grey levels of 0 to 255"] = (lambda x: 255 * x, "model(255 * images)")
    ways["inverted, dark for bright"] = (lambda x: 1 - x, "model(1 - images)")
    return _best(
        NORMALISATION, patient, right, ways, "put it into the model: hand over a module whose forward returns "
    )  # fmt: skip


def channel_order(patient: Patient, right: Tensor) -> Explanation:
    """Does it expect BGR, as OpenCV reads, or columns for rows?"""
    ways: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {}
    if patient.images.shape[1] == 3:
        ways["with red and blue swapped (BGR)"] = (lambda x: x.flip(1), "model(images.flip(1))")
    if patient.images.shape[2] == patient.images.shape[3]:
        ways["with rows and columns swapped"] = (lambda x: x.transpose(2, 3), "model(images.transpose(2, 3))")
    return _best(ORDER, patient, right, ways, "swap them back where images are read, or return ")


def _normaliser(mean: Sequence[float], std: Sequence[float]) -> tuple[Callable[[Tensor], Tensor], str]:
    """What it does to images, and the code to write."""
    shape = (1, -1, 1, 1)
    m, s = torch.tensor(mean).view(shape), torch.tensor(std).view(shape)
    code = f"model((images - mean) / std) with mean {_numbers(mean)} and std {_numbers(std)}"
    return (lambda x: (x - m) / s), code


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.4g}" for v in values)


def _best(
    name: str, patient: Patient, right: Tensor, ways: dict[str, tuple[Callable[[Tensor], Tensor], str]], advice: str
) -> Explanation:  # fmt: skip
    """Try each way of showing the images; the best one is a problem where it is clearly better than none."""
    now, best, which = int(right.sum()), right, ""
    for told_as, (change, _) in ways.items():
        try:
            seen = patient.answers(change(patient.images)).argmax(dim=1) == patient.labels
        except Exception:  # a classifier may refuse what lies outside [0, 1]
            continue
        if int(seen.sum()) > int(best.sum()):
            best, which = seen, told_as
    total = len(right)
    if which and clearly_better(best, right):
        evidence = f"{int(best.sum())} of {total} images are classified correctly when {which}, {now} as they are"
        return found(name, True, evidence, advice + ways[which][1]), int(best.sum()) - now
    no = f"no other way of showing the images is clearly better than {now} of {total} right"
    return found(name, False, no, ""), 0


def label_order(classes: int, predictions: Tensor, labels: Tensor) -> Explanation:
    """Are the labels in another order than the model's classes? Orders are tried out, and one is fitted."""
    right = predictions == labels
    orders = {
        f"(labels + {shift}) % {classes}": (torch.arange(classes) + shift) % classes for shift in range(1, classes)
    }
    by_name = torch.tensor(sorted(range(classes), key=str))  # "10" comes before "2", as folders are sorted
    orders["torch.tensor(sorted(range(K), key=str))[labels]"] = by_name
    orders["torch.tensor(sorted(range(K), key=str)).argsort()[labels]"] = by_name.argsort()
    best, how = right, ""
    for code, order in orders.items():
        seen = order[labels] == predictions
        if int(seen.sum()) > int(best.sum()):
            best, how = seen, code
    fitted, order = _fitted(classes, predictions, labels)
    if clearly_better(fitted, right) and int(fitted.sum()) > int(best.sum()):
        best, how = fitted, f"torch.tensor({order.tolist() if classes <= SHORT else '[...]'})[labels]"
    count, now = len(labels), int(right.sum())
    if how and clearly_better(best, right):
        evidence = (
            f"{int(best.sum())} of {count} images are classified correctly with the classes in another order, {now}"
        )
        fix = f"give the classes the order of the model's training, here: labels = {how.replace('K', str(classes))}"
        return found(LABELS, True, f"{evidence} in this one", fix), int(best.sum()) - now
    no = f"no other order of the classes is clearly better than {now} of {count} right"
    return found(LABELS, False, no, ""), 0


def _fitted(classes: int, predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Fit an order of the classes: label → class of the model.

    Returns:
        Which images it gets right where the other half of the images told it, N; and the order that all of them tell.
    """
    from scipy.optimize import linear_sum_assignment

    def fit(rows: Tensor) -> Tensor:
        pairs = torch.zeros(classes, classes)
        pairs.index_put_((labels[rows], predictions[rows]), torch.ones(len(rows)), accumulate=True)
        return torch.from_numpy(linear_sum_assignment(pairs.numpy(), maximize=True)[1])

    seen, everything = torch.zeros(len(labels), dtype=torch.bool), torch.arange(len(labels))
    for half in (everything[0::2], everything[1::2]):
        other = everything[~torch.isin(everything, half)]
        seen[other] = fit(half)[labels[other]] == predictions[other]
    return seen, fit(everything)


def clearly_better(new: Tensor, old: Tensor) -> bool:
    """Whether more images are right by more than chance: McNemar's test, and enough of them to matter."""
    gained, lost = int((new & ~old).sum()), int((old & ~new).sum())
    return gained - lost >= max(LEAST * len(new), SIGMAS * math.sqrt(gained + lost), 1)
