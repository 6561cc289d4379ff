from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from robustfpd.attacks.half_precision import HALF
from robustfpd.config import Norm
from robustfpd.evaluation import diagnose, evaluate

Digits = tuple[nn.Module, Tensor, Tensor]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("suite", "norm", "eps"),
    [
        ("first-look", "linf", 0.08), ("quick", "linf", 0.05), ("quick", "l2", 0.5), ("quick", "l1", 2.0),
        pytest.param("standard", "linf", 0.1, marks=pytest.mark.slow),
        pytest.param("standard", "l2", 0.5, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_an_honest_network_in_half_precision_is_trusted(
    digits: Digits, suite: str, norm: Norm, eps: float, dtype: torch.dtype
) -> None:
    count = 16 if suite == "standard" else 32
    net, images, labels = digits[0], digits[1][:count], digits[2][:count]
    half = copy.deepcopy(net).to(dtype)
    record = evaluate(half, (images.to(dtype), labels), suite=suite, eps=eps, norm=norm)
    assert record.verdict.status == "trusted", record.verdict.reasons
    single = evaluate(net, (images, labels), suite=suite, eps=eps, norm=norm)
    assert 0 < record.worst_case[0].robust.count < record.clean.count
    assert abs(record.worst_case[0].robust.count - single.worst_case[0].robust.count) <= 1


class _Softmax(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.net(images).softmax(dim=1)
        return out


@pytest.mark.parametrize("dtype", HALF)
def test_probabilities_in_half_precision_are_found(digits: Digits, dtype: torch.dtype) -> None:
    net = _Softmax(copy.deepcopy(digits[0]).to(dtype))
    record = evaluate(net, (digits[1][:20].to(dtype), digits[2][:20]), suite="first-look", eps=0.05)
    assert "squashed-outputs" in [c.name for c in record.verdict.checks if c.outcome == "suspicious"]


class _Signs(nn.Module):
    """Masks the gradients by a sign of the pixels."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.net((images - 0.5).sign() / 2 + 0.5 + 0 * images)
        return out


@pytest.mark.parametrize("dtype", HALF)
def test_masked_gradients_in_half_precision_are_found(digits: Digits, dtype: torch.dtype) -> None:
    net = _Signs(copy.deepcopy(digits[0]).to(dtype))
    record = evaluate(net, (digits[1][:32].to(dtype), digits[2][:32]), suite="first-look", eps=0.05)
    assert "vanishing-gradients" in [c.name for c in record.verdict.checks if c.outcome == "suspicious"]


def test_surrogates_in_half_precision_are_transferred_from(digits: Digits) -> None:
    net, images, labels = copy.deepcopy(digits[0]).half(), digits[1][:20].half(), digits[2][:20]
    surrogate = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).half()
    record = evaluate(net, (images, labels), suite="quick", eps=0.1, surrogates={"linear": surrogate})
    transfer = next(a for a in record.attacks if "transfer" in a.attack)
    assert (transfer.failed, transfer.attacked > 0) == (0, True)


def test_the_record_is_of_the_weights_in_half_precision(digits: Digits) -> None:
    half = copy.deepcopy(digits[0]).half()
    before = {name: value.clone() for name, value in half.state_dict().items()}
    records = [
        evaluate(net, (digits[1][:8].to(dtype), digits[2][:8]), suite="first-look", eps=0.05)
        for net, dtype in ((half, torch.float16), (copy.deepcopy(half).float(), torch.float32))
    ]
    assert records[0].weights_sha256 != records[1].weights_sha256
    assert records[0].settings_sha256 != records[1].settings_sha256
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())


@pytest.mark.parametrize("dtype", HALF)
def test_the_doctor_checks_a_network_in_half_precision(digits: Digits, dtype: torch.dtype) -> None:
    checks = diagnose(copy.deepcopy(digits[0]).to(dtype), (digits[1].to(dtype), digits[2]))
    assert [c.name for c in checks if c.outcome in ("failed", "suspicious")] == ["precision"]
    assert next(c for c in checks if c.name == "normalisation").outcome == "passed"
