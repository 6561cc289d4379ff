from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from robustfpd.attacks import autoattack
from robustfpd.attacks.autoattack import members_of
from robustfpd.errors import InputError
from robustfpd.evaluation import evaluate

if TYPE_CHECKING:
    from robustfpd.config import Norm

    Digits = tuple[nn.Module, Tensor, Tensor]

library = pytest.importorskip("pyautoattack")
NORMS: dict[Norm, tuple[str, float]] = {"linf": ("Linf", 0.1), "l2": ("L2", 0.6), "l1": ("L1", 1.5)}
BATCH = 16


def _survivors(net: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float, **options: Any) -> list[int]:
    """Return the images that are correctly classified after the library's own evaluation."""
    attack = library.AutoAttack(net, norm=norm, eps=eps, **options)
    with torch.random.fork_rng(devices=[]):
        adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=BATCH)
    correct = torch.cat([net(x) for x in torch.split(adversarial, BATCH)]).argmax(dim=1) == labels
    return torch.nonzero(correct).flatten().tolist()


@pytest.mark.parametrize("norm", ["linf", *(pytest.param(norm, marks=pytest.mark.slow) for norm in ("l2", "l1"))])
def test_the_suite_leaves_the_survivors_of_the_library_with_the_same_seed(digits: Digits, norm: Norm) -> None:
    net, images, labels = digits[0], digits[1][:24], digits[2][:24]
    name, eps = NORMS[norm]
    expected = _survivors(net, images, labels, name, eps, seed=3)
    record = evaluate(net, (images, labels), suite="autoattack", norm=norm, eps=eps, seed=3, batch_size=BATCH)
    found = {row.image for row in record.ledger if row.outcome == "misclassified"}
    assert 4 < len(expected) < 20
    assert [i for i in range(24) if i not in found] == expected
    assert [a.attack for a in record.attacks] == ["APGD-CE", "APGD-T", "FAB-T", "Square"]
    assert next(c for c in record.verdict.checks if c.name == "idle-attacks").outcome == "passed"


def test_a_member_alone_leaves_the_survivors_of_the_library(digits: Digits) -> None:
    net, images, labels = digits[0], digits[1][:BATCH], digits[2][:BATCH]
    expected = _survivors(net, images, labels, "Linf", 0.1, seed=0, version="custom", attacks=["apgd-ce"])
    adversarial = autoattack(net, images, labels, eps=0.1, members=["apgd-ce"], batch_size=BATCH)
    assert torch.nonzero(net(adversarial).argmax(dim=1) == labels).flatten().tolist() == expected


def test_fewer_classes_than_targets_have_fewer_targets(digits: Digits) -> None:
    net, images, labels = digits
    few = labels < 4
    first_four = nn.Linear(10, 4, bias=False)
    with torch.no_grad():
        first_four.weight.copy_(torch.eye(4, 10))
    four = nn.Sequential(net, first_four).eval()
    x, y = images[few][:8], labels[few][:8]
    adversarial = autoattack(four, x, y, eps=0.3, members=["apgd-t", "fab-t"])
    assert int((four(adversarial).argmax(dim=1) != y).sum()) >= 7
    assert float((adversarial - x).abs().max()) <= 0.3 + 1e-6


def test_apgd_t_needs_four_classes(digits: Digits) -> None:
    three = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    with pytest.raises(InputError, match="APGD-T needs at least 4 classes, found 3; use the suite standard"):
        autoattack(three, digits[1][:2], torch.tensor([0, 1]), eps=0.1)


def test_unknown_versions_and_members_are_errors(digits: Digits) -> None:
    net, images, labels = digits
    with pytest.raises(InputError, match="unknown version of AutoAttack 'standart'; did you mean 'standard'"):
        autoattack(net, images, labels, eps=0.1, version="standart")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown member of AutoAttack rand 'square'"):
        autoattack(net, images, labels, eps=0.1, version="rand", members=["square"])
    assert list(members_of("plus")) == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
