"""The doctor finds each fault under its name, with the fix, and no other."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustfpd as rf
from robustfpd import data as datasets
from robustfpd.config import DataConfig
from robustfpd.errors import InputError
from robustfpd.evaluation import Check, doctor
from robustfpd.evaluation.checks import NAMES
from robustfpd.evaluation.doctor import diagnose
from robustfpd.models import zoo

Digits = tuple[nn.Module, Tensor, Tensor]


class Broken(nn.Module):
    """A network with functions of its images and of its output."""

    def __init__(self, net: nn.Module, before: Callable[[Any], Any] | None, after: Callable[[Any], Any] | None) -> None:
        super().__init__()
        self.net = net
        self.before, self.after = before or (lambda x: x), after or (lambda x: x)
        self.eval()

    def forward(self, images: Tensor) -> Any:
        return self.after(self.net(self.before(images)))


class AlwaysTraining(nn.Dropout):
    """A layer whose mode does not follow `.eval()`."""

    def train(self, mode: bool = True) -> AlwaysTraining:
        self.training = True
        return self


class NoGradient(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return (images * 15).round() / 15


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0].flip(-1)


def in_place(x: Tensor) -> Tensor:
    x.sub_(0.1).mul_(0.5)
    return x.mul(2).add(0.1)


def raising(x: Tensor) -> Tensor:
    raise RuntimeError("expected input to have 3 channels")


def centred_over_the_batch(z: Tensor) -> Tensor:
    return z - z.mean(dim=0, keepdim=True)


def scrambled(x: Tensor) -> Tensor:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    return x.flatten(1)[:, order].view_as(x)


def nan_for_some(z: Tensor) -> Tensor:
    return torch.where(z.max(dim=1, keepdim=True).values > z.max() - 1, z / 0 * 0, z)


def noisy(z: Tensor) -> Tensor:
    return z + torch.randn_like(z) * 0.2


def faults(checks: list[Check], *outcomes: str) -> set[str]:
    return {check.name for check in checks if check.outcome in (outcomes or ("failed", "suspicious"))}


def test_every_check_passes_a_trained_network(digits: Digits) -> None:
    net, images, labels = digits
    checks = diagnose(net, (images, labels), num_classes=10)
    assert faults(checks, "failed", "suspicious", "skipped") == set()
    assert len({check.name for check in checks}) == len(checks) == 21
    assert {check.name for check in checks} - set(NAMES) == set(doctor.DOCTOR_CHECKS)
    assert all(check.evidence and not check.fix for check in checks)


@pytest.mark.parametrize("name", [n for n in zoo.names() if n.startswith("digits/")])
def test_every_check_passes_the_networks_of_the_zoo(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SLOW", 1e9)  # however busy the machine is
    monkeypatch.setattr(doctor, "SECONDS", 1e9)
    images = datasets.load(DataConfig()).test.floats()
    assert faults(diagnose(rf.load(name), images, num_classes=10), "failed", "suspicious", "skipped") == set()


FAULTS: dict[str, tuple[Callable[[Any], Any] | None, Callable[[Any], Any] | None, str, str]] = {
    "raises": (raising, None, "answers", "layer that adapts"),
    "a tuple": (None, lambda z: (z, None), "output", r"model\(images\)\[0\]"),
    "a dict": (None, lambda z: {"loss": None, "logits": z}, "output", r"\['logits'\]"),
    "maps of one pixel": (None, lambda z: z[:, :, None, None], "output", r"flatten\(1\)"),
    "one score": (None, lambda z: z[:, 0], "output", "two logits"),
    "in place": (in_place, None, "input-kept", "work on a copy"),
    "NaN": (None, nan_for_some, "finite-outputs", "detect_anomaly"),
    "always the same": (lambda x: 0 * x, None, "constant-output", "weights were loaded"),
    "half precision": (None, lambda z: z.half(), "precision", r"model\.float"),
    "noise": (None, noisy, "randomised-outputs", "the randomness"),
    "dropout": (lambda x: F.dropout(x, 0.3, training=True), None, "randomised-outputs", "self.training"),
    "batch statistics": (None, centred_over_the_batch, "batch-composition", "running statistics"),
    "softmax": (None, lambda z: z.softmax(dim=1), "squashed-outputs", "without the last softmax"),
    "log-softmax": (None, lambda z: z.log_softmax(dim=1), "squashed-outputs", "without log_softmax"),
    "sigmoid": (None, lambda z: z.sigmoid(), "squashed-outputs", "without the last softmax"),
    "tanh": (None, lambda z: torch.tanh(z), "squashed-outputs", "without the last softmax"),
    "no_grad": (None, lambda z: z.detach(), "vanishing-gradients", "no_grad"),
    "quantised": (NoGradient(), None, "vanishing-gradients", "round"),
    "wrong gradients": (WrongGradient.apply, None, "gradient-agreement", "custom backward"),
    "classes that the data lack": (None, lambda z: torch.cat([z, z - 60], dim=1), "classes", "a head of 10 logits"),
    "0 to 255": (lambda x: x / 255, None, "normalisation", r"model\(255 \* images\)"),
    "-1 to 1": (lambda x: x * 0.5 + 0.5, None, "normalisation", "mean 0.5 and std 0.5"),
    "inverted": (lambda x: 1 - x, None, "normalisation", r"model\(1 - images\)"),
    "columns first": (lambda x: x.transpose(2, 3), None, "channel-order", "transpose"),
    "shifted": (None, lambda z: z.roll(1, dims=1), "label-order", r"\(labels \+ 1\) % 10"),
    "another order": (None, lambda z: z[:, [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]], "label-order", r"tensor\(\["),
    "scrambled pixels": (scrambled, None, "clean-accuracy", "trained"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_alone(digits: Digits, fault: str) -> None:
    net, images, labels = digits
    before, after, name, fix = FAULTS[fault]
    checks = diagnose(Broken(net, before, after), (images.clone(), labels), num_classes=10)
    assert faults(checks) == {name}
    (one,) = (check for check in checks if check.name == name and check.fix)
    assert one.fix
    assert re.search(fix, one.fix), one.fix


def test_modes(digits: Digits) -> None:
    net, images, labels = digits
    given = nn.Sequential(nn.Dropout(0.5), net).train()
    assert faults(diagnose(given, (images, labels))) == {"training-mode"}
    assert all(m.training for m in given.modules() if m is not net and m not in set(net.modules()))
    stuck = nn.Sequential(AlwaysTraining(0.5), net).eval()
    assert "stays-in-evaluation-mode" in faults(diagnose(stuck, (images, labels)))
    assert "randomised-outputs" not in faults(diagnose(stuck, (images, labels)))


def test_modes_of_networks_that_return_a_tuple(digits: Digits) -> None:
    net, images, labels = digits
    found = diagnose(Broken(net, None, lambda z: (z, None)).train(), (images, labels))
    assert faults(found) == {"output"}  # its modes change nothing


def test_one_channel_for_three(digits: Digits) -> None:
    _, images, labels = digits
    net = nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten()).train()
    (first, second) = diagnose(net, (images, labels))
    assert (first.outcome, second.name, second.outcome) == ("passed", "answers", "failed")
    assert "images.repeat(1, 3, 1, 1)" in second.fix
    assert net.training


def test_batch_norm_in_training_mode_is_reported_as_the_mode(digits: Digits) -> None:
    net, images, labels = digits

    class Stuck(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Stuck:
            self.training = True
            return self

    norm = Stuck(1, affine=False)
    back = Broken(net, lambda x: x * images.std() + images.mean(), None)
    model = nn.Sequential(norm, back).eval()
    found = faults(diagnose(model, (images, labels)))
    assert "stays-in-evaluation-mode" in found
    assert not found & {"batch-composition", "randomised-outputs"}


PIXELS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "grey levels": (lambda x: x * 255, "divide by 255"),
    "bytes": (lambda x: (x * 255).byte(), r"float\(\) / 255"),
    "divided twice": (lambda x: x / 255, "divide by 255 once"),
    "normalised": (lambda x: (x - 0.3) / 0.4, "Normalize"),
    "overshooting": (lambda x: x * 1.1 - 0.05, "clamp"),
    "NaN": (lambda x: x.where(torch.arange(len(x))[:, None, None, None] > 1, torch.nan), "isfinite"),
    "channels last": (lambda x: x.permute(0, 2, 3, 1), "permute"),
}


@pytest.mark.parametrize("fault", PIXELS)
def test_images_outside_0_to_1_or_in_another_form(digits: Digits, fault: str) -> None:
    net, images, labels = digits
    change, fix = PIXELS[fault]
    model = Broken(net, lambda x: x * 0.4 + 0.3, None) if fault == "normalised" else net
    checks = diagnose(model, (change(images), labels), num_classes=10)
    assert faults(checks) == {"images-in-range"}
    assert re.search(fix, checks[0].fix)


LABELS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "from 1": (lambda y: y + 1, "labels - 1"),
    "floats": (lambda y: y.float(), "long"),
    "a column": (lambda y: y[:, None], "squeeze"),
    "one row each": (lambda y: F.one_hot(y, 10), "argmax"),
    "negative": (lambda y: y - 1, "from 0 to K-1"),
    "too many": (lambda y: y * 3, "trained for"),
}


@pytest.mark.parametrize("fault", LABELS)
def test_labels_that_are_not_classes(digits: Digits, fault: str) -> None:
    net, images, labels = digits
    change, fix = LABELS[fault]
    checks = diagnose(net, (images, change(labels)), num_classes=10)
    assert faults(checks) == {"labels"}
    (one,) = (check for check in checks if check.name == "labels")
    assert fix in one.fix


TWO_FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "floats from 1": (lambda y: (y + 1).float(), "run from 1 to 10", r"\.long\(\).*labels - 1"),
    "a column from 1": (lambda y: y[:, None] + 1, "run from 1 to 10", r"squeeze\(1\).*labels - 1"),
    "rows of 12": (lambda y: F.one_hot(y + 2, 12), "up to 11, but there are 10", "argmax.*trained for"),
    "50 floats": (lambda y: y[:50].float(), r"found \(50,\)", "long.*one integer per image"),
    "floats from -1": (lambda y: (y - 1).float(), "not be negative, found -1", "long.*from 0 to K-1"),
    "a column of floats": (lambda y: y[:, None].float(), "float32", "squeeze.*long"),
    "a number": (lambda y: y[0], r"found \(1,\)", "one integer per image"),
    "infinite": (lambda y: y / 0.0, "integers, found", "one integer per image"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TWO_FAULTS)
def test_labels_with_two_faults(digits: Digits, fault: str) -> None:
    net, images, labels = digits
    change, evidence, fix = TWO_FAULTS[fault]
    checks = diagnose(net, (images, change(labels)), num_classes=10)
    assert faults(checks) == {"labels"}
    (one,) = (check for check in checks if check.name == "labels")
    assert re.search(evidence, one.evidence), one.evidence
    assert re.search(fix, one.fix), one.fix


def test_channels_in_another_order() -> None:
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = 0.2 * torch.rand(60, 3, 4, 6, generator=draws)
    images[torch.arange(60), labels] += 0.5
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3, bias=False)).eval()
    with torch.no_grad():
        cast(nn.Linear, net[2]).weight.copy_(torch.eye(3).flip(0))
    # Two of three classes are swapped, which an order of the labels explains as well: pixels come first.
    checks = diagnose(net, (images, labels), num_classes=3)
    assert faults(checks) == {"channel-order"}
    assert "BGR" in next(f.evidence for f in checks if f.name == "channel-order")


def test_classes_sorted_by_name() -> None:
    """Folders 0 to 11 in the order 0, 1, 10, 11, 2, …"""
    order = torch.tensor(sorted(range(12), key=str))
    labels = torch.arange(48) % 12
    images = 0.05 + 0.05 * labels.float()[:, None, None, None].expand(-1, 1, 4, 5)

    class ReadsLevel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            level = (x.mean(dim=(1, 2, 3)) - 0.05) / 0.05
            return -(level[:, None] - torch.arange(12)).square()

    checks = diagnose(ReadsLevel(), (images, order.argsort()[labels]), num_classes=12)
    one = next(f for f in checks if f.name == "label-order")
    assert one.outcome == "failed"
    assert "key=str" in one.fix
    fixed = torch.tensor(sorted(range(12), key=str))[order.argsort()[labels]]
    assert torch.equal(fixed, labels)
    assert "sorted(range(12), key=str))[labels]" in one.fix


def test_half_precision_weights(digits: Digits) -> None:
    _, images, labels = digits
    half = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).half().eval()
    (one,) = [f for f in diagnose(half, (images, labels)) if f.outcome == "failed"]
    assert one.name == "answers"
    assert "model.float()" in one.fix


def test_slow_classifiers_are_suspicious_and_checked_on_fewer_images(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, images, labels = digits
    monkeypatch.setattr(doctor, "SLOW", 1e-4)
    monkeypatch.setattr(doctor, "SECONDS", 0.01)

    def wait(x: Tensor) -> Tensor:
        time.sleep(0.001 * len(x))
        return x

    checks = diagnose(Broken(net, wait, None), (images, labels))
    assert faults(checks) == {"speed"}
    assert "8 of 8" in next(f.evidence for f in checks if f.name == "clean-accuracy") or "few" in checks[-1].evidence


def test_few_images_explain_no_low_accuracy(digits: Digits) -> None:
    net, images, labels = digits
    checks = diagnose(net, (images[:5], labels[:5]))
    assert faults(checks) == set()
    assert faults(checks, "skipped") == {"normalisation", "channel-order", "label-order"}


def test_the_classifier_is_restored(digits: Digits) -> None:
    _, images, labels = digits
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10)).train()
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    diagnose(net, (images, labels))
    assert [m.training for m in net] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_loaders_and_refused_inputs(digits: Digits) -> None:
    net, images, labels = digits
    batches = [(images[i : i + 30], labels[i : i + 30]) for i in range(0, 90, 30)]
    assert faults(diagnose(net, batches)) == set()
    for data in (3, [], [(1, 2)], (images[0], labels), images):
        with pytest.raises(InputError):
            diagnose(net, data)
    with pytest.raises(InputError, match=r"torch.nn.Module, found int"):
        diagnose(cast(nn.Module, 3), (images, labels))
    with pytest.raises(InputError, match="num_images"):
        diagnose(net, (images, labels), num_images=0)
