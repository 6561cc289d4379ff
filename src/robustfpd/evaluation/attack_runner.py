"""Run one attack on one batch, and classify the adversarial images in float32."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.attacks.adaptive import PRE_SQUASH, View
from robustfpd.attacks.base import QueryCounter, check_logits, check_shape, reproducible
from robustfpd.attacks.losses import margin
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Norm
from robustfpd.errors import InputError, first_line
from robustfpd.evaluation.inputs import EvaluationData
from robustfpd.evaluation.ledger import CLEAN, LedgerRow, Outcome
from robustfpd.evaluation.suites import AttackSpec
from robustfpd.rng import generator

CHANGED = "it changed the classifier's"
"""The note of a row starts with this if its attack changed a weight or a buffer; the outcome counts."""
TOLERANCE = 1e-5
"""How far an adversarial image may lie outside its ball, by rounding, relative and absolute."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate", "cannot allocate memory", "not enough memory", "alloc_failed")


@dataclass(frozen=True)
class AttackOutcome:
    """Result of one attack on one batch."""

    rows: list[LedgerRow]
    """One for each image."""
    adversarial: Tensor | None = None
    """Adversarial images M×C×H×W; None if the attack raised an error, and for rows of the ledger or another rank."""


@dataclass(frozen=True)
class _Measurements:
    """Values of one batch, an entry per image, on the CPU."""

    predictions: Tensor
    distances: Tensor
    margins: Tensor
    failures: list[str]
    """Why the attack failed on an image; empty where it did not."""
    queries: Tensor
    gradients: Tensor
    seconds: float


class AttackRunner:
    """Attacks a classifier batch by batch.

    Args:
        classifier: images N×C×H×W in [0, 1] → logits N×K, in evaluation mode.
        data: images and labels, on the CPU.
        device: device of the classifier.
        norm: norm of the Lp ball.
        seed: seed of the attacks.
        batch_size: images per forward pass; halved for good when memory runs out.
        num_classes: K; 0 if unknown.
        bfloat16: attacks differentiate the classifier in bfloat16. Adversarial images are classified in float32.
    """

    def __init__(
        self, classifier: nn.Module, data: EvaluationData, device: torch.device, norm: Norm, seed: int,
        batch_size: int, num_classes: int = 0, *, bfloat16: bool = False,
    ) -> None:  # fmt: skip
        self.classifier, self.data, self.device = classifier, data, device
        self.images, self.labels = data.images, data.labels
        self.norm, self.seed, self.batch_size = norm, seed, batch_size
        self.num_classes, self.bfloat16 = num_classes, bfloat16
        self.clean_predictions = torch.zeros(len(data.images), dtype=torch.long)
        self.views: dict[str, View] = {}
        self._counters: dict[str, QueryCounter] = {}
        self._check_passes = 0, 0
        self._state = {name: value.detach().clone() for name, value in tensors(classifier).items()}

    def set_views(self, views: Mapping[str, View]) -> None:
        """Set the modules that attacks differentiate, by name; their passes are counted."""
        self._counters = {name: QueryCounter(view.module) for name, view in views.items()}
        self.views = {name: replace(view, module=self._counters[name]) for name, view in views.items()}

    def view_module(self, name: str) -> nn.Module:
        """Return the module of a view without its counter."""
        return self._counters[name].classifier

    @property
    def check_passes(self) -> tuple[int, int]:
        """Images that went forward and backward through the views outside of attacks."""
        counters = self._counters.values()
        forward = self._check_passes[0] + sum(c.forward_passes for c in counters)
        return forward, self._check_passes[1] + sum(c.backward_passes for c in counters)

    def classify(self, indices: Tensor) -> AttackOutcome:
        """Classify clean images, and keep the predictions.

        Raises:
            InputError: the classifier raises an error, or its output is not logits N×K of at least 2 classes.
        """
        if len(indices) > self.batch_size:
            parts = torch.split(indices, self.batch_size)
            return AttackOutcome([row for part in parts for row in self.classify(part).rows])
        start = time.perf_counter()
        x = self.images[indices].to(self.device)
        draws = generator(self.seed, CLEAN, *self.data.ids[indices].tolist())
        try:
            logits = self._logits(self.classifier, x, draws)
        except InputError:
            raise
        except Exception as error:
            if not self._halve_batch_size(error, len(indices)):
                raise InputError(
                    f"the classifier raised an error on images {tuple(x.shape)} {x.dtype} on {x.device}: "
                    f"{type(error).__name__}: {first_line(error)}"
                ) from error
            logits = None
        if logits is None:  # outside of `except`: an error that is being handled keeps its tensors in memory
            return self.classify(indices)
        logits = check_logits(logits, self.labels.max().expand(len(x))).cpu()
        if logits.shape[1] < 2:
            raise InputError(f"the classifier must have at least 2 classes, found {logits.shape[1]}")
        self.clean_predictions[indices] = logits.argmax(dim=1)
        measured = _Measurements(
            predictions=logits.argmax(dim=1), distances=torch.zeros(len(x)), margins=self._margins(logits, indices),
            failures=[""] * len(x), queries=torch.ones(len(x), dtype=torch.long),
            gradients=torch.zeros(len(x), dtype=torch.long), seconds=time.perf_counter() - start,
        )  # fmt: skip
        return AttackOutcome(self._rows(CLEAN, 0.0, indices, measured))

    def run(self, spec: AttackSpec, eps: float, indices: Tensor) -> AttackOutcome:
        """Run one attack on one batch. An error of the attack becomes the note of the batch's rows.

        When memory runs out, the batch size is halved for good and the images are attacked again.
        """
        if len(indices) <= self.batch_size or fills_batches(spec):
            try:
                return self._attack(spec, eps, indices, bfloat16=self.bfloat16)
            except Exception as error:
                note = f"{type(error).__name__}: {first_line(error)}"
                halved = self._halve_batch_size(error, len(indices))
            if halved:  # outside of `except`: an error that is being handled keeps its tensors in memory
                return self.run(spec, eps, indices)
            if len(indices) <= self.batch_size:
                queries, gradients = self._passes(self._counters[spec.view], len(indices))
                zeros, failures = torch.zeros(len(indices)), [note] * len(indices)
                predictions = self.clean_predictions[indices]
                measured = _Measurements(predictions, zeros, zeros, failures, queries, gradients, seconds=0.0)
                return AttackOutcome(self._rows(spec.label, eps, indices, measured))
        rows, adversarial = list[LedgerRow](), list[Tensor]()
        for part in torch.split(indices, self.batch_size):
            outcome = self.run(spec, eps, part)
            rows += outcome.rows
            images = outcome.adversarial
            adversarial.append(self.images[part].to(self.device) if images is None else images)
        return AttackOutcome(rows, torch.cat(adversarial))

    def _halve_batch_size(self, error: Exception, num_images: int) -> bool:
        """Halve the batch size if memory ran out, and return whether it was halved."""
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
            isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OUT_OF_MEMORY)
        )
        size = min(num_images, self.batch_size)
        if out_of_memory and size > 1:
            self.batch_size = size // 2
        return out_of_memory and size > 1

    def _attack(self, spec: AttackSpec, eps: float, indices: Tensor, *, bfloat16: bool) -> AttackOutcome:
        """Run one attack in one precision, and restore the classifier's state, also if the attack raises an error."""
        start = time.perf_counter()
        x, y = self.images[indices].to(self.device), self.labels[indices].to(self.device)
        attack, view, counter = attacks.get(spec.attack), self.views[spec.view], self._counters[spec.view]
        options = dict(spec.options) if view.loss is None else {**spec.options, "loss": view.loss}
        options |= {"batch_size": self.batch_size} if fills_batches(spec) else {}
        draws = generator(self.seed, spec.label, repr(eps), *self.data.ids[indices].tolist())
        forward, backward = self._check_passes  # those of the view since the last attack were for checks
        self._check_passes = forward + counter.forward_passes, backward + counter.backward_passes
        counter.reset()
        misclassified, pre_squash = None, None
        try:
            counter.low_precision = bfloat16
            adversarial = attack(counter, x, y, eps=eps, norm=self.norm, generator=draws, **options)
            if bfloat16:
                misclassified = (self._batched_logits(counter, adversarial, draws).argmax(dim=1) != y).cpu()
            counter.low_precision = False
            distances, failures = self._distances(adversarial, x, eps, minimal=attack.minimal)
            logits = check_shape(self._batched_logits(self.classifier, adversarial, draws), y).cpu()
            if PRE_SQUASH in self.views:  # saturated logits have no margins
                pre_squash = self._batched_logits(self.view_module(PRE_SQUASH), adversarial, draws).cpu()
        finally:
            counter.low_precision = False
            changed = self._restore_state()
        queries, gradients = self._passes(counter, len(x))
        finite = logits.isfinite().all(dim=1).tolist()
        not_finite = "adversarial image cannot be classified: NaN or infinite logits"
        measured = _Measurements(
            predictions=logits.nan_to_num().argmax(dim=1), distances=distances,
            margins=self._margins(logits if pre_squash is None else pre_squash, indices),
            failures=[f or ("" if fine else not_finite) for f, fine in zip(failures, finite, strict=True)],
            queries=queries + 1 + (pre_squash is not None), gradients=gradients, seconds=time.perf_counter() - start,
        )  # fmt: skip
        note = f"{CHANGED} {changed}" if changed else ""
        outcome = AttackOutcome(self._rows(spec.label, eps, indices, measured, attack.minimal, note), adversarial)
        return outcome if misclassified is None else self._repeat_in_float32(spec, eps, indices, outcome, misclassified)

    def _repeat_in_float32(
        self, spec: AttackSpec, eps: float, indices: Tensor, outcome: AttackOutcome, misclassified: Tensor
    ) -> AttackOutcome:
        """Attack again in float32 the images that are misclassified in bfloat16 alone, before they count as robust."""
        rows, adversarial = outcome.rows, outcome.adversarial
        assert adversarial is not None
        correct = torch.tensor([r.adversarial_prediction == r.label and r.outcome != "failed" for r in rows])
        adversarial = adversarial.clone()
        for part in torch.split(torch.nonzero(misclassified & correct).flatten(), self.batch_size):
            repeated = self._attack(spec, eps, indices[part], bfloat16=False)
            assert repeated.adversarial is not None
            adversarial[part.to(adversarial.device)] = repeated.adversarial
            for position, row in zip(part.tolist(), repeated.rows, strict=True):
                first = rows[position]
                costs = {c: getattr(first, c) + getattr(row, c) for c in ("queries", "gradients", "seconds")}
                rows[position] = row.model_copy(update=costs)
        return AttackOutcome(rows, adversarial)

    def _passes(self, counter: QueryCounter, num_images: int) -> tuple[Tensor, Tensor]:
        """Return the last attack's forward and backward passes per image, and reset the counter."""
        known = torch.zeros(num_images, dtype=torch.long) if counter.per_image is None else counter.per_image
        queries = known + _spread(max(counter.forward_passes - int(known.sum()), 0), num_images)
        gradients = _spread(counter.backward_passes, num_images)
        counter.reset()
        return queries, gradients

    def _batched_logits(self, module: nn.Module, images: Tensor, draws: torch.Generator) -> Tensor:
        """Return logits, `batch_size` images at a time."""
        return torch.cat([self._logits(module, part, draws) for part in torch.split(images, self.batch_size)])

    @torch.no_grad()
    def _logits(self, module: nn.Module, images: Tensor, draws: torch.Generator) -> Tensor:
        with reproducible(draws):
            logits: Tensor = module(images)
        return logits

    def _distances(self, adversarial: Tensor, images: Tensor, eps: float, *, minimal: bool) -> tuple[Tensor, list[str]]:
        """Return the norm of each perturbation, and what is wrong with each adversarial image, empty if nothing is."""
        if adversarial.shape != images.shape:
            raise InputError(f"it returned a tensor of shape {tuple(adversarial.shape)}")
        adversarial, images = adversarial.cpu(), images.cpu()  # not all devices have float64
        delta = (adversarial.double() - images.double()).nan_to_num(torch.inf)
        distances = lp_ball(self.norm).norm(delta).float()
        low, high = adversarial.flatten(1).amin(dim=1), adversarial.flatten(1).amax(dim=1)
        inside = (distances <= eps * (1 + TOLERANCE) + TOLERANCE) | (minimal & distances.isfinite())
        valid = inside & (low >= 0) & (high <= 1)
        ball = f"it left the {self.norm} ball of radius {eps:.4g}"
        failures = [
            "" if fine else f"{ball}: distance {d:.6g}, pixels in [{least:.4g}, {most:.4g}]"
            for fine, d, least, most in zip(*(v.tolist() for v in (valid, distances, low, high)), strict=True)
        ]
        return distances.nan_to_num(0, 0, 0), failures

    def _margins(self, logits: Tensor, indices: Tensor) -> Tensor:
        """Return the margins of logits N×K: the best wrong logit minus the true one."""
        return margin(logits.float(), self.labels[indices]).nan_to_num(0, 0, 0)

    def _restore_state(self) -> str:
        """Restore the weights and buffers that an attack changed; return the first one's name, empty if none was."""
        changed = ""
        for name, value in tensors(self.classifier).items():
            if not torch.equal(value.nan_to_num(), self._state[name].nan_to_num()):
                value.copy_(self._state[name])
                changed = changed or name
        return changed

    def _rows(
        self, label: str, eps: float, indices: Tensor, measured: _Measurements, minimal: bool = False, note: str = ""
    ) -> list[LedgerRow]:
        """Return one row for each image; `note` is that of images on which the attack did not fail."""
        labels, distances = self.labels[indices], measured.distances
        limit = eps * (1 + TOLERANCE) if minimal else torch.inf
        misclassified = ((measured.predictions != labels) & (distances.double() <= limit)).tolist()
        rows = []
        for i, index in enumerate(indices.tolist()):
            failure = measured.failures[i]
            outcome: Outcome = "failed" if failure else "misclassified" if misclassified[i] else "robust"
            rows.append(
                LedgerRow(
                    image=int(self.data.ids[index]), label=int(labels[i]),
                    clean_prediction=int(self.clean_predictions[index]), attack=label, eps=eps,
                    adversarial_prediction=int(measured.predictions[i]), distance=float(distances[i]),
                    outcome=outcome, margin=float(measured.margins[i]), queries=int(measured.queries[i]),
                    gradients=int(measured.gradients[i]), seconds=measured.seconds / len(indices), seed=self.seed,
                    note=failure or note,
                )
            )  # fmt: skip
        return rows


@contextmanager
def forward_passes(classifier: nn.Module) -> Iterator[Callable[[], int]]:
    """Count the images that go through a classifier; yields a function that returns the count.

    TorchScript modules have no hooks: theirs are not counted.
    """
    sizes: list[int] = []
    if isinstance(classifier, torch.jit.ScriptModule):
        yield lambda: 0
        return
    hook = classifier.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    try:
        yield lambda: sum(sizes)
    finally:
        hook.remove()


def fills_batches(spec: AttackSpec) -> bool:
    """Return whether the attack takes a whole block and keeps its batches full."""
    return "batch_size" in attacks.get(spec.attack).options


def tensors(classifier: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers by name; the state of quantised modules holds other objects as well."""
    return {name: value for name, value in classifier.state_dict().items() if isinstance(value, Tensor)}


def _spread(total: int, count: int) -> Tensor:
    """Return `total` passes spread evenly over `count` images; the first images take the remainder."""
    return torch.full((count,), total // count) + (torch.arange(count) < total % count).long()
