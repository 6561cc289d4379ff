"""Checks of modes, images, eps and clean accuracy; for the doctor also of labels, normalisation, channels, classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binomtest
from torch import Tensor, nn

from robustfpd.attacks.base import check_labels, reproducible
from robustfpd.device import evaluating
from robustfpd.errors import InputError
from robustfpd.evaluation.attack_runner import tensors
from robustfpd.evaluation.checks.context import CheckContext, judge, skipped
from robustfpd.evaluation.inputs import device_of
from robustfpd.evaluation.record import Check

GREY_LEVEL = 1 / 255
SIGNIFICANT = 0.05  # probability of as many correct guesses below which an accuracy counts as better than chance
LEAST_GAIN = 0.05  # share of the images that an explanation of a low accuracy must gain
SIGMAS = 3  # standard deviations that it must gain over chance
MAX_LISTED_CLASSES = 20
STATISTICS = {
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "MNIST": ((0.1307,), (0.3081,)),
    "[-1, 1]": ((0.5,), (0.5,)),
}
"""Mean and std that classifiers are often trained with."""
Classify = Callable[[Tensor], Tensor]  # images N×C×H×W to predicted classes N


def training_mode(classifier: nn.Module, images: Tensor) -> Check:
    """Check that logits are the same in the modes as given and in evaluation mode."""
    name, modules = "training-mode", list(classifier.modules())
    training = [m for m in modules if m.training]
    if not training:
        return judge(name, False, "all modules were given in evaluation mode", training=0)
    counts = f"{len(training)} of {len(modules)} modules were given in training mode"
    state = {key: value.detach().clone() for key, value in tensors(classifier).items()}
    x = images[:8].to(device_of(classifier, images), copy=True)

    def logits() -> Any:
        try:
            with reproducible(torch.Generator().manual_seed(0)), torch.no_grad():
                return classifier(x)
        finally:
            for key, value in tensors(classifier).items():
                value.copy_(state[key])

    try:
        as_given = logits()
        with evaluating(classifier):
            same = bool(torch.isclose(as_given, logits(), rtol=1e-4, atol=1e-5, equal_nan=True).all())
    except Exception as error:  # if evaluation mode raises it too, the evaluation reports it
        return judge(name, True, f"{counts} and raise {type(error).__name__} there", training=len(training))
    if same:
        return judge(name, False, f"{counts}; the logits are those of evaluation mode", training=len(training))
    kinds = sorted({type(m).__name__ for m in training if not list(m.children())})
    evidence = f"{counts} ({', '.join(kinds[:4])}), with other logits than in evaluation mode, which attacks see"
    return judge(name, True, evidence, training=len(training))


def images_in_range(images: Tensor) -> Check:
    """Check that images in [0, 1] are not almost black."""
    low, high = (float(v) for v in images.aminmax())
    dark = high <= 4 * GREY_LEVEL
    evidence = f"pixels lie in [{low:.4g}, {high:.4g}]" + (": divided by 255 twice?" if dark else "")
    return judge("images-in-range", dark, evidence, low=low, high=high)


def stays_in_evaluation_mode(context: CheckContext) -> Check:
    """Check that `.eval()` reaches every module."""
    training = [name for name, module in context.runner.classifier.named_modules() if module.training]
    first = f", first {training[0]!r}" if training else ""
    evidence = f"{len(training)} modules stay in training mode after .eval(){first}"
    return judge("stays-in-evaluation-mode", bool(training), evidence, modules=len(training))


def clean_accuracy(context: CheckContext) -> Check:
    """Check that the accuracy without an attack is better than chance."""
    runner = context.runner
    return better_than_chance(runner.clean_predictions, runner.labels, runner.num_classes)


def better_than_chance(predictions: Tensor, labels: Tensor, classes: int) -> Check:
    """Check that an accuracy is better than chance, by a binomial test."""
    name, count, correct = "clean-accuracy", len(labels), int((predictions == labels).sum())
    classes = max(classes, int(labels.max()) + 1)
    evidence = f"{correct} of {count} images are classified correctly, of {classes} classes"
    if classes**-count > SIGNIFICANT:
        return skipped(name, f"{evidence}: too few images to distinguish from chance")
    p_value = binomtest(correct, count, 1 / classes, alternative="greater").pvalue
    hint = ": no better than chance" if p_value > SIGNIFICANT else ""
    return judge(name, p_value > SIGNIFICANT, evidence + hint, right=correct, guessed=p_value)


def eps_units(context: CheckContext) -> Check:
    """Check that eps is a radius in pixels of [0, 1]: neither in grey levels nor divided by 255 twice."""
    largest, pixels = max(context.radii), context.runner.images[0].numel()
    per_pixel = {"linf": largest, "l2": largest / pixels**0.5, "l1": largest / pixels}[context.norm]
    one_pixel = per_pixel if context.norm == "linf" else per_pixel * pixels**0.5
    hint = ""
    if per_pixel > 0.5:
        hint = ": the balls hold a grey image; in grey levels instead of pixels of [0, 1]?"
    elif one_pixel < GREY_LEVEL / 2:
        hint = ": less than half a grey level; divided by 255 twice?"
    radii = ", ".join(f"{eps:.4g}" for eps in context.radii)
    return judge("eps-units", bool(hint), f"eps {radii} in {context.norm}{hint}", largest=largest)


def label_values(labels: Any, count: int, classes: int) -> tuple[Check, Tensor | None]:
    """Check that labels are one class from 0 to `classes` - 1 for each of `count` images.

    Returns:
        The check, and the labels as integers N after its fix; None if they cannot be repaired.
    """
    repaired, faults = _as_integers(labels, count) if isinstance(labels, Tensor) else (labels, [])
    valid = ""
    try:
        repaired = check_labels(repaired, count)
        low, high = int(repaired.min()), int(repaired.max())
        valid = f"{len(set(repaired.tolist()))} classes among {count} labels, {low} to {high}"
        if high == classes and low >= 1:
            evidence = f"labels run from {low} to {high}, but classes from 0 to {classes - 1}"
            faults.append((evidence, "count classes from 0: labels = labels - 1"))
            repaired = repaired - 1
        elif high >= classes:
            evidence = f"labels run up to {high}, but there are {classes} classes"
            faults.append((evidence, "use the data set that the model was trained for"))
            repaired = None
    except InputError as error:
        faults.append((str(error), "give one integer per image, from 0 to K-1"))
        repaired = None
    evidence, fix = ("; ".join(e for e, _ in faults), "; then ".join(f for _, f in faults))
    return judge("labels", bool(faults), evidence or valid, fix, "failed"), repaired


def _as_integers(labels: Tensor, count: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """Return labels as integers N where possible, and evidence and fix of each conversion."""
    faults = []
    if labels.ndim == 2 and labels.shape[1] == 1:
        faults.append((f"shape {tuple(labels.shape)}", "labels = labels.squeeze(1)"))
        labels = labels[:, 0]
    if labels.ndim == 2 and len(labels) == count and labels.shape[1] > 1:
        fix = "give the number of the class: labels = labels.argmax(dim=1)"
        faults.append((f"shape {tuple(labels.shape)}: one row per image", fix))
        labels = labels.int().argmax(dim=1) if labels.dtype == torch.bool else labels.argmax(dim=1)
    if labels.is_floating_point() and bool((labels.isfinite() & (labels == labels.round())).all()):
        faults.append((f"labels are {labels.dtype}", "make them integers: labels = labels.long()"))
        labels = labels.long()
    return labels, faults


def normalisation(classify: Classify, images: Tensor, labels: Tensor, correct: Tensor) -> Check:
    """Check that images on another scale are not classified clearly better."""
    own = images.mean(dim=(0, 2, 3)).tolist(), images.std(dim=(0, 2, 3)).clamp_min(1e-4).tolist()  # C each
    candidates = []
    for name, (mean, std) in {**STATISTICS, "the images' own mean and std": own}.items():
        if len(mean) in (1, images.shape[1]):
            m, s = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))  # 1 C 1 1
            numbers = [", ".join(f"{v:.4g}" for v in values) for values in (mean, std)]
            code = f"model((images - mean) / std) with mean {numbers[0]} and std {numbers[1]}"
            candidates.append(((images - m) / s, f"normalised as {name}", code))
    candidates.append((255 * images, "in grey levels of 0 to 255", "model(255 * images)"))
    candidates.append((1 - images, "inverted", "model(1 - images)"))
    advice = "put it into the model: evaluate a module whose forward returns "
    return _of_images("normalisation", classify, [(x, d, advice + code) for x, d, code in candidates], labels, correct)


def channel_order(classify: Classify, images: Tensor, labels: Tensor, correct: Tensor) -> Check:
    """Check that images in BGR, as OpenCV reads them, or with columns for rows are not classified clearly better."""
    advice, candidates = "swap them where images are read, or return ", []
    if images.shape[1] == 3:
        candidates.append((images.flip(1), "with red and blue swapped (BGR)", advice + "model(images.flip(1))"))
    if images.shape[2] == images.shape[3]:
        code = "model(images.transpose(2, 3))"
        candidates.append((images.transpose(2, 3), "with rows and columns swapped", advice + code))
    return _of_images("channel-order", classify, candidates, labels, correct)


def label_order(predictions: Tensor, labels: Tensor, classes: int) -> Check:
    """Check that another order of the classes does not fit the predictions clearly better."""
    correct = predictions == labels
    by_name = torch.tensor(sorted(range(classes), key=str))  # "10" comes before "2", as folders are sorted
    orders = [((torch.arange(classes) + k) % classes, f"(labels + {k}) % {classes}") for k in range(1, classes)]
    code = f"torch.tensor(sorted(range({classes}), key=str))"
    orders += [(by_name, f"{code}[labels]"), (by_name.argsort(), f"{code}.argsort()[labels]")]
    masks = [(order[labels] == predictions, code) for order, code in orders]
    held_out, fitted = _fit_order(predictions, labels, classes)
    if clearly_better(held_out, correct):
        listed = fitted.tolist() if classes <= MAX_LISTED_CLASSES else "[...]"
        masks.append((held_out, f"torch.tensor({listed})[labels]"))
    fix = "use the order of classes of the model's training, here: labels = "
    return _explain("label-order", [(m, "with the classes in another order", fix + c) for m, c in masks], correct)


def _fit_order(predictions: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Fit an order of the classes, label → class of the model.

    Returns:
        Which images are correct under the order fitted to the other half of the images, N; the order fitted to all, K.
    """

    def fit(indices: Tensor) -> Tensor:
        pairs = torch.zeros(classes, classes)
        pairs.index_put_((labels[indices], predictions[indices]), torch.ones(len(indices)), accumulate=True)
        return torch.from_numpy(linear_sum_assignment(pairs.numpy(), maximize=True)[1])

    held_out, every = torch.zeros(len(labels), dtype=torch.bool), torch.arange(len(labels))
    for half, other in ((every[0::2], every[1::2]), (every[1::2], every[0::2])):
        held_out[other] = fit(half)[labels[other]] == predictions[other]
    return held_out, fit(every)


def _of_images(
    name: str, classify: Classify, candidates: Sequence[tuple[Tensor, str, str]], labels: Tensor, correct: Tensor
) -> Check:  # fmt: skip
    """Classify each candidate (images, description, fix)."""
    masks = []
    for images, description, fix in candidates:
        try:
            masks.append((classify(images) == labels, f"when {description}", fix))
        except Exception:  # a classifier may refuse pixels outside [0, 1]
            continue
    return _explain(name, masks, correct)


def _explain(name: str, candidates: Sequence[tuple[Tensor, str, str]], correct: Tensor) -> Check:
    """Return a failed check if the best candidate (correct N, description, fix) is clearly better than `correct`."""
    count, now = len(correct), int(correct.sum())
    best, description, fix = max(candidates, key=lambda c: int(c[0].sum()), default=(correct, "", ""))
    if not clearly_better(best, correct):
        return judge(name, False, f"no other {name} is clearly better than {now} of {count} correct", gained=0)
    evidence = f"{int(best.sum())} of {count} images are classified correctly {description}, {now} as given"
    return judge(name, True, evidence, fix, "failed", gained=int(best.sum()) - now)


def clearly_better(new: Tensor, old: Tensor) -> bool:
    """Return whether more images are correct than by chance (McNemar's test), and enough of them to matter."""
    gained, lost = int((new & ~old).sum()), int((old & ~new).sum())
    return gained - lost >= max(LEAST_GAIN * len(new), SIGMAS * math.sqrt(gained + lost), 1)
