from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustfpd.errors import InputError
from robustfpd.models.decoder import RestorationDecoder

CHANNELS = (4, 6, 8, 10)


def pyramid(size: tuple[int, int], reduction: int, levels: int = 4) -> list[Tensor]:
    maps = []
    for level in range(levels):
        step = reduction * 2**level
        maps.append(torch.randn(2, CHANNELS[level], -(-size[0] // step), -(-size[1] // step)))
    return maps


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    reduction=st.sampled_from([1, 2, 3, 4, 5, 8, 16]),
    size=st.tuples(st.integers(1, 45), st.integers(1, 45)),
    levels=st.integers(1, 4),
    out_channels=st.sampled_from([1, 3]),
)
def test_the_image_has_the_requested_size(
    reduction: int, size: tuple[int, int], levels: int, out_channels: int
) -> None:
    decoder = RestorationDecoder(CHANNELS[:levels], reduction, width=8, out_channels=out_channels)
    restored = decoder(pyramid(size, reduction, levels), size)
    assert restored.shape == (2, out_channels, *size)
    assert bool(restored.isfinite().all())


@pytest.mark.parametrize("size", [(32, 32), (27, 33)])
def test_four_levels_are_the_diagram(size: tuple[int, int]) -> None:
    decoder = RestorationDecoder(CHANNELS, 4, width=8, out_channels=3)
    c2, c3, c4, c5 = pyramid(size, 4)

    def lateral(index: int, c: Tensor) -> Tensor:
        conv = decoder.laterals[index]
        assert isinstance(conv, nn.Conv2d)
        return torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], c) + conv.bias.reshape(1, -1, 1, 1)  # type: ignore[union-attr]

    def up(p: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(p, size=like.shape[2:], mode="bilinear", align_corners=False)

    p5 = lateral(3, c5)
    p4 = up(p5, c4) + lateral(2, c4)
    p3 = up(p4, c3) + lateral(1, c3)
    p2 = up(p3, c2) + lateral(0, c2)
    smooth = F.conv2d(p2, decoder.smooth.weight, decoder.smooth.bias, padding=1)
    image = smooth
    for layer, stride in zip(decoder.upscale, (2, 2, 1), strict=True):
        assert isinstance(layer, nn.ConvTranspose2d)
        image = F.conv_transpose2d(image, layer.weight, layer.bias, stride=stride)
    if image.shape[2:] != size:
        image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    assert torch.allclose(decoder([c2, c3, c4, c5], size), image, atol=1e-5)


@pytest.mark.parametrize(("reduction", "factor"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (16, 16)])
def test_upscaling_undoes_the_reduction(reduction: int, factor: int) -> None:
    decoder = RestorationDecoder(CHANNELS, reduction, width=100, out_channels=3)
    assert decoder.upscale(torch.zeros(1, 100, 3, 5)).shape == (1, 3, 3 * factor, 5 * factor)


def test_published_widths() -> None:
    decoder = RestorationDecoder((256, 512, 1024, 2048), 4, width=256, out_channels=3)
    shapes = [tuple(layer.weight.shape) for layer in decoder.upscale]  # type: ignore[arg-type]
    assert shapes == [(256, 64, 2, 2), (64, 16, 2, 2), (16, 3, 1, 1)]


def test_the_published_resnexts_layers_keep_the_size_in_pairs() -> None:
    decoder = RestorationDecoder((256, 512, 1024, 2048), 1, width=128, out_channels=3, unstrided_kernel=2)
    shapes = [tuple(layer.weight.shape) for layer in decoder.upscale]  # type: ignore[arg-type]
    assert shapes == [(128, 64, 2, 2), (64, 16, 2, 2), (16, 3, 1, 1)]
    assert decoder.upscale[0](torch.zeros(1, 128, 6, 9)).shape == (1, 64, 5, 8)
    assert decoder.upscale(torch.zeros(1, 128, 6, 9)).shape == (1, 3, 6, 9)


def test_a_single_kernel_of_two_is_refused() -> None:
    with pytest.raises(InputError, match="a reduction of 2 needs one such layer; take unstrided_kernel=3"):
        RestorationDecoder(CHANNELS, 2, width=8, out_channels=3, unstrided_kernel=2)


@pytest.mark.parametrize("reduction", [4, 8])
def test_without_layers_that_keep_the_size_their_kernel_does_not_matter(reduction: int) -> None:
    two, three = (RestorationDecoder(CHANNELS, reduction, 8, 3, unstrided_kernel=k) for k in (2, 3))
    assert [t.shape for t in two.state_dict().values()] == [t.shape for t in three.state_dict().values()]


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("unstrided_kernel", [3, None])
def test_a_decoder_that_starts_at_zero_restores_zeros_and_its_last_layer_learns_first(
    reduction: int, unstrided_kernel: int | None
) -> None:
    decoder = RestorationDecoder(
        CHANNELS, reduction, width=8, out_channels=3, unstrided_kernel=unstrided_kernel, start_at_zero=True
    )
    restored = decoder(pyramid((27, 33), reduction), (27, 33))
    assert restored.shape == (2, 3, 27, 33)
    assert not bool(restored.any())
    (restored - 1).square().sum().backward()
    moving = {n for n, p in decoder.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moving == {f"upscale.{len(decoder.upscale) - 1}.{n}" for n in ("weight", "bias")}


def test_without_a_kernel_layers_that_keep_the_size_are_left_out() -> None:
    kernels = {}
    for reduction in (1, 2, 4, 8):
        decoder = RestorationDecoder(CHANNELS, reduction, width=100, out_channels=3, unstrided_kernel=None)
        kernels[reduction] = [tuple(layer.weight.shape) for layer in decoder.upscale]  # type: ignore[arg-type]
        assert decoder.upscale(torch.zeros(1, 100, 3, 5)).shape == (1, 3, 3 * reduction, 5 * reduction)
    assert kernels == {
        1: [(100, 3, 1, 1)],
        2: [(100, 64, 2, 2), (64, 3, 1, 1)],
        4: [(100, 64, 2, 2), (64, 16, 2, 2), (16, 3, 1, 1)],
        8: [(100, 64, 2, 2), (64, 16, 2, 2), (16, 16, 2, 2), (16, 3, 1, 1)],
    }


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_every_level_and_parameter_takes_part(levels: int) -> None:
    decoder = RestorationDecoder(CHANNELS[:levels], 2, width=8, out_channels=1)
    maps = [m.requires_grad_() for m in pyramid((16, 16), 2, levels)]
    decoder(maps, (16, 16)).square().sum().backward()
    assert all(m.grad is not None and float(m.grad.abs().max()) > 0 for m in maps)
    assert all(p.grad is not None for p in decoder.parameters())


def test_the_input_features_are_not_changed() -> None:
    decoder = RestorationDecoder(CHANNELS, 2, width=8, out_channels=1)
    maps = pyramid((16, 16), 2)
    copies = [m.clone() for m in maps]
    decoder(maps, (16, 16))
    assert len(maps) == 4
    assert all(torch.equal(m, c) for m, c in zip(maps, copies, strict=True))


def test_a_missing_level_is_noticed() -> None:
    decoder = RestorationDecoder(CHANNELS, 2, width=8, out_channels=1)
    with pytest.raises(AssertionError):
        decoder(pyramid((16, 16), 2)[:3], (16, 16))
