"""The fast non-local means equal the literal ones, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robustfpd.models.denoise import non_local_means
from robustfpd.models.ops import non_local

KINDS = ("dot", "normalised", "softmax", "gaussian")
FAST = {
    "dot": non_local.dot_product, "normalised": non_local.normalised, "softmax": non_local.softmax,
    "gaussian": non_local.gaussian,
}  # fmt: skip


def maps(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 20, 4, 5), (2, 21, 4, 5), (1, 40, 1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_the_literal_code(
    kind: Any, residual: bool, shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    literal: Any = non_local_means(kind)
    x = maps(shape).contiguous(memory_format=layout).requires_grad_()
    expected, found = (f(x, residual=residual) for f in (literal.__wrapped__, FAST[kind]))
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(expected)
    theirs, ours = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (expected, found))
    assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("residual", [False, True])
def test_first_and_second_derivatives_are_right(kind: Any, residual: bool) -> None:
    def means(x: Tensor) -> Tensor:
        return FAST[kind](x, residual=residual)

    x = maps((1, 3, 2, 2)).requires_grad_()
    assert torch.autograd.gradgradcheck(means, (x,))
    for channels in (3, 6):
        assert torch.autograd.gradcheck(means, (maps((1, channels, 2, 2)).requires_grad_(),))


def test_what_runs_is_the_fast_form_and_what_is_traced_the_literal_one() -> None:
    x = torch.rand(2, 3, 4, 5)
    for kind in KINDS:
        means: Any = non_local_means(kind)  # type: ignore[arg-type]
        assert torch.equal(means(x), FAST[kind](x))
        traced = torch.func.vmap(means)(x[None])[0]
        assert torch.allclose(traced, means(x), atol=1e-5)
        slope = torch.func.grad(lambda y, f=means: f(y).sum())(x)
        x_grad = x.clone().requires_grad_()
        assert torch.allclose(slope, torch.autograd.grad(means(x_grad).sum(), x_grad)[0], rtol=1e-4, atol=1e-5)


def test_the_smaller_product_is_formed_first() -> None:
    sizes: list[int] = []
    original = torch.bmm

    def spy(a: Tensor, b: Tensor) -> Tensor:
        out = original(a, b)
        sizes.append(out.shape[1] * out.shape[2])
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bmm", spy)
        non_local.dot_product(maps((1, 3, 4, 5)))
        non_local.dot_product(maps((1, 50, 4, 5)))
    assert min(sizes[:2]) == 9
    assert min(sizes[2:]) == 400


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_map_is_read_without_a_copy_and_returned_in_channels_last(layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    assert non_local._rows(x).data_ptr() == x.data_ptr()
    assert non_local.dot_product(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", KINDS)
def test_positions_have_no_order_and_images_of_a_batch_do_not_mix(kind: Any) -> None:
    x = maps((3, 5, 3, 4))
    shuffle = torch.randperm(12)

    def permuted(y: Tensor) -> Tensor:
        return y.flatten(2)[:, :, shuffle].reshape(y.shape)

    assert torch.allclose(FAST[kind](permuted(x)), permuted(FAST[kind](x)), atol=1e-9)
    alone = torch.cat([FAST[kind](image.unsqueeze(0)) for image in x])
    assert torch.allclose(FAST[kind](x), alone, atol=1e-10)
