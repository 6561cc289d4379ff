"""The runner: one attack, one batch, what came of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.attacks.adaptive import PRE_SQUASH, View
from robustfpd.attacks.base import QueryCounter, reproducible
from robustfpd.attacks.inputs import check_logits, check_shape
from robustfpd.attacks.losses import dlr
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Norm
from robustfpd.errors import InputError, first_line
from robustfpd.evaluation.ledger import CLEAN, LedgerRow, Outcome
from robustfpd.evaluation.memory import is_out_of_memory, make_room, refills
from robustfpd.evaluation.suites import AttackSpec
from robustfpd.rng import generator

CHANGED = "it changed the classifier's"
"""How the note begins where an attack did what it must not, and what it found counts all the same."""
COSTS = ("queries", "gradients", "seconds")
"""Columns that add up where an image was attacked twice."""
OUTSIDE = 1e-5
"""How far, by rounding, an adversarial image may lie outside its ball; more in half precision."""


class AttackRunner:
    """A classifier in evaluation mode, images, and what is attacked of it; images and labels are on the CPU."""

    def __init__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, numbers: Tensor, device: torch.device,
        norm: Norm, seed: int, batch_size: int, classes: int = 0, *, bfloat16: bool = False,
    ) -> None:  # fmt: skip
        self.classifier, self.images, self.labels, self.numbers = classifier, images, labels, numbers
        self.device, self.norm, self.seed, self.batch_size = device, norm, seed, batch_size
        self.bfloat16 = bfloat16
        """Attacks search in bfloat16; what they find is judged in float32 all the same."""
        self.views: dict[str, View] = {}
        self._counters: dict[str, QueryCounter] = {}
        self._looks = 0, 0
        self._state = {name: value.detach().clone() for name, value in tensors(classifier).items()}
        self.classes = classes
        self.clean = torch.zeros(len(images), dtype=torch.long)
        self.found: Tensor | None = None
        """Where the last attack left its batch; None where it raised an error, and for batches read from a ledger."""

    def offer(self, views: Mapping[str, View]) -> None:
        """Set what attacks may differentiate."""
        self._counters = {name: QueryCounter(view.module) for name, view in views.items()}
        self.views = {name: replace(view, module=self._counters[name]) for name, view in views.items()}

    def uncounted(self, view: str) -> nn.Module:
        """The module of a view, for who only wants to draw it."""
        return self._counters[view].classifier

    @property
    def looks(self) -> tuple[int, int]:
        """Images that went forward and backward through the views, but in no attack of the runner's own."""
        unsettled = self._counters.values()
        forward = self._looks[0] + sum(c.forward_passes for c in unsettled)
        return forward, self._looks[1] + sum(c.backward_passes for c in unsettled)

    def ask(self, indices: Tensor) -> list[LedgerRow]:
        """Rows of images as they are; an InputError where the classifier cannot be asked at all."""
        if len(indices) > self.batch_size:
            return [row for part in torch.split(indices, self.batch_size) for row in self.ask(part)]
        start = time.perf_counter()
        x = self.images[indices].to(self.device)
        draws = generator(self.seed, CLEAN, *self.numbers[indices].tolist())
        logits = None
        try:
            logits = self._logits(self.classifier, x, draws)
        except InputError:
            raise
        except Exception as error:
            if not self._halved(error, len(indices)):
                raise InputError(
                    f"the classifier raised an error on images {tuple(x.shape)} {x.dtype} on {x.device}: "
                    f"{type(error).__name__}: {first_line(error)}"
                ) from error
        if logits is None:  # out here: an error that is being handled keeps alive all that filled the memory
            make_room(self.device)
            return self.ask(indices)
        logits = check_logits(logits, self.labels.max().expand(len(x)))
        if logits.shape[1] < 2:
            raise InputError(f"the classifier must tell at least 2 classes apart, found {logits.shape[1]}")
        self.clean[indices] = logits.argmax(dim=1).cpu()
        ones = torch.ones(len(x), dtype=torch.long)
        return self._rows(
            CLEAN, 0.0, indices, logits.cpu(), torch.zeros(len(x)), ones, 0 * ones, time.perf_counter() - start
        )

    def units(self, planned: AttackSpec, block: Tensor, batch_size: int) -> list[Tensor]:
        """What `run` takes at once of a block: all of it where the attack keeps its batches full by itself."""
        return [block] if refills(planned) else list(torch.split(block, batch_size))

    def run(self, planned: AttackSpec, eps: float, indices: Tensor) -> list[LedgerRow]:
        """Run one attack on one block or batch; whatever it raises is noted and costs only one batch.

        Where memory does not suffice, the batch size is halved for good and the images are attacked again.
        """
        if len(indices) > self.batch_size and not refills(planned):
            return self._in_parts(planned, eps, indices)
        try:
            return self._once(planned, eps, indices, bfloat16=self.bfloat16)
        except Exception as error:
            halved, note = self._halved(error, len(indices)), f"{type(error).__name__}: {first_line(error)}"
        # Out here: an error that is being handled keeps alive all that filled the memory.
        if halved:
            make_room(self.device)
            return self.run(planned, eps, indices)
        if len(indices) > self.batch_size:
            return self._in_parts(planned, eps, indices)
        return self._failed(planned, eps, indices, note)

    def _in_parts(self, planned: AttackSpec, eps: float, indices: Tensor) -> list[LedgerRow]:
        rows, found = [], []
        for part in torch.split(indices, self.batch_size):
            rows += self.run(planned, eps, part)
            found.append(self.images[part].to(self.device) if self.found is None else self.found)
        self.found = torch.cat(found)
        return rows

    def _halved(self, error: Exception, images: int) -> bool:
        """Halve the batch size where that may help."""
        if not is_out_of_memory(error) or min(images, self.batch_size) == 1:
            return False
        self.batch_size = min(images, self.batch_size) // 2
        return True

    def _once(self, planned: AttackSpec, eps: float, indices: Tensor, *, bfloat16: bool) -> list[LedgerRow]:
        """Run one attack in one precision; it raises what the attack raises, with the classifier put back."""
        start = time.perf_counter()
        x, y = self.images[indices].to(self.device), self.labels[indices].to(self.device)
        attack, view, counter = attacks.get(planned.attack), self.views[planned.view], self._counters[planned.view]
        options = dict(planned.options) if view.loss is None else {**planned.options, "loss": view.loss}
        options |= {"batch_size": self.batch_size} if refills(planned) else {}
        draws = generator(self.seed, planned.label, repr(eps), *self.numbers[indices].tolist())
        self._settle(counter)
        self.found, open_logits = None, None
        try:
            counter.low_precision = bfloat16
            found = attack(counter, x, y, eps=eps, norm=self.norm, generator=draws, **options)
            unsure = self._wrong(counter, found, y, draws) if bfloat16 else None
            counter.low_precision = False
            distance, faults = self._measure(found, x, eps, minimal=attack.minimal)
            logits = check_shape(self._answers(self.classifier, found, draws), y).cpu()
            if PRE_SQUASH in self.views:  # saturated logits are all alike
                open_logits = self._answers(self._counters[PRE_SQUASH].classifier, found, draws).cpu()
        finally:
            counter.low_precision = False
            changed = self._restore()
        queries, gradients = self._passes(counter, len(x))
        rows = self._rows(
            planned.label, eps, indices, logits, distance, queries + 1 + (open_logits is not None), gradients,
            time.perf_counter() - start, faults=faults, changed=changed, open_logits=open_logits,
            minimal=attack.minimal,
        )  # fmt: skip
        if unsure is not None:
            rows, found = self._confirmed(planned, eps, indices, rows, found, unsure)
        self.found = found
        return rows

    def _confirmed(
        self, planned: AttackSpec, eps: float, indices: Tensor, rows: list[LedgerRow], found: Tensor, wrong: Tensor
    ) -> tuple[list[LedgerRow], Tensor]:
        """Attack again in float32 what bfloat16 alone misclassifies, before it counts as robust."""
        right = torch.tensor([r.adversarial_prediction == r.label and r.outcome != "failed" for r in rows])
        again = torch.nonzero(wrong.cpu() & right).flatten()
        found = found.clone()
        for part in torch.split(again, self.batch_size):
            redone = self._once(planned, eps, indices[part], bfloat16=False)
            assert self.found is not None
            found[part.to(found.device)] = self.found
            for place, row in zip(part.tolist(), redone, strict=True):
                spent = {name: getattr(rows[place], name) + getattr(row, name) for name in COSTS}
                rows[place] = row.model_copy(update=spent)
        return rows, found

    def _failed(self, planned: AttackSpec, eps: float, indices: Tensor, note: str) -> list[LedgerRow]:
        """Rows of a batch on which the attack raised an error."""
        self.found = None
        nothing = torch.zeros(len(indices))
        queries, gradients = self._passes(self._counters[planned.view], len(indices))
        return self._rows(
            planned.label, eps, indices, None, nothing, queries, gradients, 0.0, faults=[note] * len(indices),
            minimal=attacks.get(planned.attack).minimal,
        )  # fmt: skip

    def _settle(self, counter: QueryCounter) -> None:
        """Whatever went through a view until now was of no attack that counts."""
        self._looks = self._looks[0] + counter.forward_passes, self._looks[1] + counter.backward_passes
        counter.reset()

    def _passes(self, counter: QueryCounter, images: int) -> tuple[Tensor, Tensor]:
        """Passes of the last attack on each image, forward and backward."""
        told = torch.zeros(images, dtype=torch.long) if counter.per_image is None else counter.per_image
        queries = told + _shares(max(counter.forward_passes - int(told.sum()), 0), images)
        gradients = _shares(counter.backward_passes, images)
        counter.reset()
        return queries, gradients

    def _wrong(self, module: nn.Module, images: Tensor, labels: Tensor, draws: torch.Generator) -> Tensor:
        """Which images a module misclassifies."""
        return self._answers(module, images, draws).argmax(dim=1) != labels

    def _answers(self, module: nn.Module, images: Tensor, draws: torch.Generator) -> Tensor:
        """Logits, `batch_size` images at a time."""
        return torch.cat([self._logits(module, part, draws) for part in torch.split(images, self.batch_size)])

    def _measure(self, found: Tensor, images: Tensor, eps: float, *, minimal: bool) -> tuple[Tensor, list[str]]:
        """Distances, and what is wrong with each image if anything is."""
        if found.shape != images.shape:
            raise InputError(f"it returned no images but {tuple(found.shape)}")
        found, images = found.cpu(), images.cpu()  # not all devices have float64
        delta = (found.double() - images.double()).nan_to_num(torch.inf)
        distance = lp_ball(self.norm).norm(delta).float().cpu()
        rounding = max(OUTSIDE, torch.finfo(found.dtype).eps)
        low, high = found.flatten(1).amin(dim=1), found.flatten(1).amax(dim=1)
        inside = (distance <= eps * (1 + rounding) + rounding) | (minimal & distance.isfinite())
        right = inside & (low >= 0) & (high <= 1)
        ball = f"it left the {self.norm} ball of radius {eps:.4g}"
        faults = [
            "" if fine else f"{ball}: distance {d:.6g}, pixels in [{least:.4g}, {most:.4g}]"
            for fine, d, least, most in zip(*(v.tolist() for v in (right, distance, low, high)), strict=True)
        ]
        return distance.nan_to_num(0, 0, 0), faults

    @torch.no_grad()
    def _logits(self, module: nn.Module, images: Tensor, draws: torch.Generator) -> Tensor:
        with reproducible(draws):
            logits: Tensor = module(images)
        return logits

    def _restore(self) -> str:
        """Put back what an attack changed in the classifier, and name the first of it; "" where nothing is."""
        changed = ""
        for name, value in tensors(self.classifier).items():
            if not torch.equal(value.nan_to_num(), self._state[name].nan_to_num()):
                value.copy_(self._state[name])
                changed = changed or name
        return changed

    def _rows(
        self, label: str, eps: float, indices: Tensor, logits: Tensor | None, distance: Tensor, queries: Tensor,
        gradients: Tensor, seconds: float, *, faults: Sequence[str] = (), changed: str = "",
        open_logits: Tensor | None = None, minimal: bool = False,
    ) -> list[LedgerRow]:  # fmt: skip
        """One row per image; where something went wrong, nothing was found."""
        labels, rows = self.labels[indices], []
        notes = list(faults) or [""] * len(indices)
        if logits is not None:
            finite = logits.isfinite().all(dim=1).tolist()
            lost = "adversarial image cannot be classified: NaN or infinite logits"
            notes = [note or ("" if fine else lost) for note, fine in zip(notes, finite, strict=True)]
        prediction = self.clean[indices] if logits is None else logits.nan_to_num().argmax(dim=1)
        told = logits if open_logits is None else open_logits
        near = torch.zeros(len(indices)) if told is None else dlr(told.float(), labels)
        limit = eps * (1 + OUTSIDE) if minimal else float("inf")
        for row, index in enumerate(indices.tolist()):
            wrong = int(prediction[row]) != int(labels[row]) and float(distance[row]) <= limit
            outcome: Outcome = "failed" if notes[row] else "misclassified" if wrong else "robust"
            rows.append(
                LedgerRow(
                    image=int(self.numbers[index]), label=int(labels[row]), clean_prediction=int(self.clean[index]),
                    attack=label, eps=eps, adversarial_prediction=int(prediction[row]), distance=float(distance[row]),
                    outcome=outcome, margin=float(near[row].nan_to_num(0, 0, 0)), queries=int(queries[row]),
                    gradients=int(gradients[row]), seconds=seconds / len(indices), seed=self.seed,
                    note=notes[row] or (f"{CHANGED} {changed}" if changed else ""),
                )
            )  # fmt: skip
        return rows


@contextmanager
def forward_passes(classifier: nn.Module) -> Iterator[list[int]]:
    """Sizes of the batches that a classifier is asked meanwhile."""
    sizes: list[int] = []
    if isinstance(
        classifier, torch.jit.ScriptModule
    ):  # takes no hooks: what is looked at beside attacks goes uncounted
        yield sizes
        return
    hook = classifier.register_forward_pre_hook(lambda module, given: sizes.append(len(given[0])))
    try:
        yield sizes
    finally:
        hook.remove()


def tensors(classifier: nn.Module) -> dict[str, Tensor]:
    """Weights and statistics; quantised modules also keep what is no tensor."""
    return {name: value for name, value in classifier.state_dict().items() if isinstance(value, Tensor)}


def _shares(total: int, count: int) -> Tensor:
    """`total` passes split evenly over `count` images, the first ones taking what is left over."""
    return torch.full((count,), total // count) + (torch.arange(count) < total % count).long()
