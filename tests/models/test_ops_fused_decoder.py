from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robustfpd.models.decoder import RestorationDecoder
from robustfpd.models.ops.fused_decoder import fuse, run_fused


def _chain(decoder: RestorationDecoder) -> list[nn.Conv2d | nn.ConvTranspose2d]:
    layers = [decoder.smooth, *decoder.upscale]
    return [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]


def _one_by_one(layers: list[nn.Conv2d | nn.ConvTranspose2d], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_fused_decoder_equals_its_layers_one_after_another(reduction: int, kernel: int) -> None:
    if (reduction, kernel) == (2, 2):
        pytest.skip("no such decoder")
    torch.manual_seed(0)
    decoder = RestorationDecoder((5,), reduction, 200, 3, unstrided_kernel=kernel).double()
    layers, x = _chain(decoder), torch.randn(2, 200, 3, 4, dtype=torch.float64, requires_grad=True)
    fused = fuse(layers)
    assert fused is not None
    expected, found = _one_by_one(layers, x), fused(x)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)  # the borders too, where padding is
    weights, parameters = torch.randn_like(expected), [x, *decoder.smooth.parameters(), *decoder.upscale.parameters()]
    slopes = [torch.autograd.grad((out * weights).sum(), parameters) for out in (expected, found)]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-10) for a, b in zip(*slopes, strict=True))


def test_a_chain_is_fused_only_where_that_saves_multiplications() -> None:
    assert fuse(_chain(RestorationDecoder((5,), 4, 128, 3))) is not None
    chain = _chain(RestorationDecoder((5,), 4, 128, 3))
    x = torch.randn(1, 128, 2, 2)
    assert torch.allclose(run_fused(chain, x), _one_by_one(chain, x), atol=1e-5)
    # 3·32² channels at the coarse positions are more than the doublings one by one.
    assert fuse(_chain(RestorationDecoder((5,), 32, 64, 3))) is None
    chain = _chain(RestorationDecoder((5,), 32, 64, 3))
    x = torch.randn(1, 64, 2, 2)
    assert torch.equal(run_fused(chain, x), _one_by_one(chain, x))
    overlapping: list[nn.Conv2d | nn.ConvTranspose2d] = [nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3, stride=2)]
    assert fuse(overlapping) is None
    assert fuse([nn.ConvTranspose2d(4, 4, 1)]) is None


def test_fused_weights_follow_the_parameters() -> None:
    decoder = RestorationDecoder((5,), 4, 96, 3)
    x = torch.randn(1, 5, 4, 4)
    with torch.no_grad():
        before = decoder([x], (16, 16))
        last = decoder.upscale[-1]
        assert isinstance(last, nn.ConvTranspose2d)
        assert last.bias is not None
        last.bias += 1
        assert torch.allclose(decoder([x], (16, 16)), before + 1, atol=1e-5)
