"""An FPD of the protocol `improved`: what it computes at its start, and what its gates and its residual add."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.fpds import GATED, as_trained
from tests.models.conftest import MINI, fresh, mini
from torch import Tensor

import robustfpd as rf
from robustfpd.models.denoise import dot_product, normalised
from robustfpd.models.small_networks import resnet_mini


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a fraction of the largest value."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("normalise", ["each_pass", "once"])
def test_a_new_fpd_computes_what_its_network_computes_on_normalised_images(normalise: Any) -> None:
    net = resnet_mini(1, num_classes=4).eval()
    model = rf.enhance(net, **MINI, **GATED, normalise=normalise, mean=(0.2,), std=(0.5,)).eval()
    x = torch.rand(4, 1, 16, 16)
    out = model(x)
    assert relative(out.logits, net((x - 0.2) / 0.5)) < 1e-5
    assert torch.equal(out.restored, x)


def gates(model: rf.FPD) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in ("gate", "middle_gate")}


@pytest.mark.parametrize("denoise", ["normalised", "dot", "softmax", "gaussian", "bottleneck"])
def test_gates_and_the_restorations_last_layer_start_at_zero(denoise: str) -> None:
    model = fresh(denoise=denoise)
    assert set(gates(model)) == {"backbone.inserted.0.gate", "backbone.inserted.1.gate", "middle_gate"}
    assert not any(bool(gate) for gate in gates(model).values())
    assert not any(bool(p.any()) for p in model.decoder.upscale[-1].parameters())
    assert all(bool(p.any()) for layer in model.decoder.upscale[:-1] for p in layer.parameters())


def test_improved_leaves_out_denoising_and_runs_the_stem_alone_in_front() -> None:
    model = rf.enhance("resnet_mini", **MINI)
    assert not gates(model)
    assert not model.backbone.inserted
    assert model.backbone.front == len(model.decoder.laterals) == 1
    as_trained(model).eval()
    x = torch.rand(2, 1, 16, 16)
    out = model(x)
    restored = x + 0.1 * model.decoder(model.backbone(x), (16, 16))
    assert torch.allclose(out.restored, restored, atol=1e-6)
    assert torch.allclose(out.logits, model.head.linear(model.backbone.classify(restored)), atol=1e-6)


def test_gates_exist_where_something_is_denoised() -> None:
    assert set(gates(fresh(middle="none"))) == {"backbone.inserted.0.gate", "backbone.inserted.1.gate"}
    assert set(gates(fresh(denoise="none"))) == {"middle_gate"}
    assert not gates(fresh(denoise_gate=False))
    assert not gates(fresh(protocol="corrected"))


@pytest.mark.parametrize("denoise", ["none", "bottleneck"])
def test_gated_means_are_bounded_where_no_affinity_is_chosen(denoise: str) -> None:
    x = 1e4 * torch.rand(2, 1, 8, 8)
    means = fresh(denoise=denoise).non_local_means(x)
    assert torch.equal(means, normalised(x))
    assert torch.equal(fresh(denoise=denoise, protocol="corrected").non_local_means(x), dot_product(x))


def test_each_gate_and_the_restoration_change_the_output() -> None:
    x = torch.rand(2, 1, 16, 16)
    model = fresh().eval()
    with torch.no_grad():
        start = model(x)
        for gate in gates(model).values():
            gate.fill_(0.3)
            out = model(x)
            gate.zero_()
            assert relative(out.logits, start.logits) > 1e-3
            assert torch.equal(out.restored, x)
        trained = as_trained(model, gate=0.0)(x)
    assert relative(trained.logits, start.logits) > 1e-3
    assert float((trained.restored - x).abs().max()) > 0.01


def test_the_first_gradient_reaches_gates_and_the_restorations_last_layer() -> None:
    model = fresh()
    labels = torch.tensor([0, 1, 2, 3])
    F.cross_entropy(model(torch.rand(4, 1, 16, 16)).logits, labels).backward()  # type: ignore[no-untyped-call]
    found = {**gates(model), **dict(model.decoder.upscale[-1].named_parameters())}
    assert len(found) == 5
    assert all(p.grad is not None and bool(p.grad.abs().max() > 0) for p in found.values())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(("scale", "options"), [(0.1, {}), (0.7, {"restoration_scale": 0.7})])
@pytest.mark.parametrize("normalise", ["each_pass", "once"])
def test_the_residual_is_added_to_the_images_in_units_of_the_decoder(
    normalise: Any, scale: float, options: dict[str, Any]
) -> None:
    model = mini(normalise=normalise, mean=(0.2,), std=(0.5,), **options).eval()
    x = torch.rand(2, 1, 16, 16)
    residual = model.decoder(model.backbone((x - 0.2) / 0.5), (16, 16))
    expected = x + scale * (0.5 * residual if normalise == "once" else residual)
    assert torch.allclose(model.restore(x), expected, atol=1e-6)


def test_without_restoration_the_back_pass_alone_classifies_the_images() -> None:
    model = mini().eval()
    x = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        out = model(x, restore=False)
        assert torch.equal(out.restored, x)
        assert torch.equal(out.logits, model.head(model.back(x, x)))
        assert not torch.equal(out.logits, model(x).logits)
        assert relative(fresh().eval()(x, restore=False).logits, fresh().eval()(x).logits) < 1e-5
