from __future__ import annotations

import pytest
import torch

from robustfpd.errors import InputError
from robustfpd.models import enhance
from robustfpd.models.precision import chosen


@pytest.mark.parametrize(("amx", "avx"), [(True, True), (True, False), (False, True), (False, False)])
def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch, amx: bool, avx: bool) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx)
    cpu = torch.device("cpu")
    assert chosen("auto", cpu) == ("bf16" if amx or avx else "fp32")
    assert (chosen("fp32", cpu), chosen("bf16", cpu)) == ("fp32", "bf16")


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_bf16_on_gpus_that_have_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert chosen("auto", torch.device("cuda", 0)) == expected
    assert chosen("auto", torch.device("mps")) == "fp32"


def test_other_precisions_are_refused() -> None:
    with pytest.raises(InputError, match="fp32"):
        chosen("fp31", torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("denoise", ["dot", "softmax", "gaussian", "bottleneck"])
def test_under_autocast_an_fpd_stays_near_itself(denoise: str) -> None:
    model = enhance("resnet_mini", num_classes=4, in_channels=1, image_size=16, denoise=denoise).train()
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    model(images)
    model.eval()
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images)
    assert found.restored.dtype == torch.float32  # eight bits are too few for a picture
    assert torch.allclose(found.restored, expected.restored, atol=0.05)
    assert torch.allclose(found.logits.float(), expected.logits, atol=0.05)
    found.restored.square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
