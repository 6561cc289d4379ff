from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.attacks.base import attack as make_attack
from robustfpd.config import Norm
from robustfpd.errors import InputError
from robustfpd.evaluation import EvaluationRecord, evaluate, suites
from robustfpd.evaluation.memory import block_size, found_batch_size, is_out_of_memory
from robustfpd.evaluation.suites import AttackSpec, Suite

if TYPE_CHECKING:
    Digits = tuple[nn.Module, Tensor, Tensor]

ATTACKS = [
    AttackSpec("FGSM", "fgsm"),
    AttackSpec("PGD", "pgd", options={"steps": 8, "early_stop": True}),
    AttackSpec("APGD-CE", "apgd-ce", options={"steps": 8}),
]


@pytest.fixture(autouse=True)
def _suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites._SUITES, "ours", Suite(lambda target: ATTACKS, probes=0))


class Narrow(nn.Module):
    """Takes so many images at once and no more; keeps the size of every batch that it took."""

    def __init__(self, inner: nn.Module, most: int, error: Exception) -> None:
        super().__init__()
        self.inner, self.most, self.error = inner, most, error
        self.taken, self.refused = list[int](), list[int]()

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > self.most:
            self.refused.append(len(images))
            raise self.error
        self.taken.append(len(images))
        out: Tensor = self.inner(images)
        return out


def _found(record: EvaluationRecord) -> list[tuple[Any, ...]]:
    return [(r.image, r.attack, r.eps, r.adversarial_prediction, r.outcome) for r in record.ledger]


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4503599627370496 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["torch", "allocator", "python"])
def test_a_batch_size_that_does_not_fit_is_halved_and_nothing_is_lost(digits: Digits, error: Exception) -> None:
    net, images, labels = digits
    expected = evaluate(net, (images, labels), suite="ours", eps=0.03, gallery=0)
    narrow = Narrow(net, 40, error).eval()
    record = evaluate(narrow, (images, labels), suite="ours", eps=0.03, gallery=0)
    assert narrow.refused == [64]
    assert max(narrow.taken) == 32
    assert record.batch_size == 32 < expected.batch_size == 64
    assert _found(record) == _found(expected)
    assert not any(r.note for r in record.ledger)


def test_what_does_not_fit_alone_is_noted_as_a_failure(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> None:
    net, images, labels = digits

    @make_attack("fgsm")
    def hungry(
        classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        raise ERRORS[0]

    monkeypatch.setitem(attacks._ATTACKS, "fgsm", hungry)
    record = evaluate(net, (images[:20], labels[:20]), suite="ours", eps=0.03, gallery=0)
    failed = [r for r in record.ledger if r.attack == "FGSM"]
    assert {r.outcome for r in failed} == {"failed"}
    assert failed[0].note.startswith("OutOfMemoryError: CUDA out of memory")
    assert record.batch_size == 1
    assert record.attacks[1].failed == 0


def test_an_error_of_an_attack_that_refills_costs_one_batch(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> None:
    net, images, labels = digits

    class Picky(nn.Module):
        """Refuses gradients of the 30th image."""

        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad and bool((x - images[30]).abs().flatten(1).amax(dim=1).lt(0.031).any()):
                raise IndexError("not this one")
            out: Tensor = net(x)
            return out

    record = evaluate(Picky(), (images, labels), suite="ours", eps=0.03, batch_size=8, gallery=0)
    pgd = [r for r in record.ledger if r.attack == "PGD"]
    assert 0 < sum(r.outcome == "failed" for r in pgd) <= 8
    assert [r.note for r in pgd if r.image == 30] == ["IndexError: not this one"]


def test_blocks_follow_from_what_was_asked_alone() -> None:
    assert [block_size(n, None) for n in (1, 60, 256, 300, 1000, 1025, 50_000)] == [64, 64, 64, 75, 250, 256, 256]
    assert block_size(1000, 512) == 512
    cpu, cuda, small = torch.device("cpu"), torch.device("cuda"), torch.zeros(1, 1, 28, 28)
    assert found_batch_size(small, cpu, 250) == 64
    assert found_batch_size(torch.zeros(1, 3, 224, 224), cpu, 250) == 4
    assert found_batch_size(torch.zeros(1, 3, 2000, 2000), cpu, 250) == 1
    assert found_batch_size(small, cuda, 250) == 250
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


@pytest.mark.parametrize("batch_size", [0, -3, 2.5, "large"])
def test_batch_sizes_that_are_none_are_refused(digits: Digits, batch_size: Any) -> None:
    with pytest.raises(InputError, match="batch_size must be"):
        evaluate(digits[0], digits[1:], suite="ours", eps=0.03, batch_size=batch_size)


class Watched(nn.Module):
    """Keeps the precisions in which images are passed, and gradients come back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.asked = inner, set[tuple[bool, torch.dtype]]()

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.inner(images)
        self.asked.add((images.requires_grad, hidden.dtype))
        return hidden


def test_attacks_see_float32_whatever_autocast_the_caller_is_in(digits: Digits) -> None:
    watched = Watched(digits[0]).eval()
    images, labels = digits[1][:20], digits[2][:20]
    expected = evaluate(watched, (images, labels), suite="ours", eps=0.03, gallery=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert digits[0](images).dtype == torch.bfloat16
        record = evaluate(watched, (images, labels), suite="ours", eps=0.03, gallery=0)
    assert {dtype for _, dtype in watched.asked} == {torch.float32}
    assert _found(record) == _found(expected)
    assert record.search_precision == "fp32"
    assert next(c for c in record.verdict.checks if c.name == "search-precision").outcome == "passed"


def test_bfloat16_is_searched_and_float32_decides(digits: Digits) -> None:
    watched = Watched(digits[0]).eval()
    record = evaluate(watched, digits[1:], suite="ours", eps=0.03, search_precision="bf16", gallery=0)
    assert (True, torch.bfloat16) in watched.asked
    exact = evaluate(digits[0], digits[1:], suite="ours", eps=0.03, gallery=0)
    # Many of this small network's margins are within bfloat16's rounding: what stands is too much, never too little.
    assert 0 <= record.worst_case[0].robust.count - exact.worst_case[0].robust.count <= 12
    assert record.search_precision == "bf16"
    check = next(c for c in record.verdict.checks if c.name == "search-precision")
    assert (check.outcome, check.evidence) == (
        "suspicious",
        "attacks differentiated the classifier in bfloat16; float32 confirmed every success, but nothing that stands "
        "was attacked in float32: evaluate with fp32",
    )
    with pytest.raises(InputError, match="search_precision"):
        evaluate(digits[0], digits[1:], eps=0.03, search_precision="fp8")  # type: ignore[arg-type]


class Liar(nn.Module):
    """Misclassifies everything in bfloat16; in float32 it is right, and attacks along gradients find it out."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.inner(images)
        return out.roll(1, dims=1) if out.dtype == torch.bfloat16 else out


def test_a_success_that_float32_does_not_confirm_is_attacked_again(digits: Digits) -> None:
    liar = Liar(digits[0]).eval()
    exact = evaluate(liar, digits[1:], suite="ours", eps=0.03, gallery=0, every_attack=True)
    record = evaluate(liar, digits[1:], suite="ours", eps=0.03, gallery=0, every_attack=True, search_precision="bf16")
    for found, expected in zip(record.attacks, exact.attacks, strict=True):
        assert abs(found.misclassified - expected.misclassified) <= 2
        assert found.forward_passes > expected.forward_passes
