from __future__ import annotations

import warnings

import pytest
import timm
import timm.layers.create_act
import timm.layers.squeeze_excite
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustfpd.models.ops.elu import ELU, UNDERFLOW, swap_activations, to_elu


@settings(deadline=None, derandomize=True)
@given(values=st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=20))
def test_values_and_slopes_are_those_of_torch(values: list[float]) -> None:
    x = torch.tensor([*values, 0.0, -1e-8, 1e-8])
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ELU()(ours), F.elu(theirs)
    assert torch.allclose(out, expected, rtol=0, atol=1e-6)
    weights = torch.linspace(-1, 1, len(x))
    (slope,) = torch.autograd.grad((out * weights).sum(), ours)
    (expected_slope,) = torch.autograd.grad((expected * weights).sum(), theirs)
    assert torch.allclose(slope, expected_slope, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_below_the_cut_off_exp_is_negligible(dtype: torch.dtype) -> None:
    x = torch.tensor([UNDERFLOW - 1e-3, UNDERFLOW, UNDERFLOW + 1e-3, -88.0, -100.0, -1e30], dtype=dtype)
    assert torch.equal(ELU()(x), F.elu(x))
    assert float(torch.tensor(UNDERFLOW, dtype=torch.float64).exp()) < torch.finfo(torch.float64).eps / 2


def test_infinities_and_nan_are_those_of_torch() -> None:
    x = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert torch.equal(ELU()(x).nan_to_num(7), F.elu(x).nan_to_num(7))


def test_the_gradient_is_right_in_double_precision() -> None:
    x = torch.randn(40, dtype=torch.float64)
    x = x[x.abs() > 1e-2].requires_grad_()
    assert torch.autograd.gradcheck(ELU(), (x,))
    assert torch.autograd.gradgradcheck(ELU(), (x,))


def test_the_second_derivative_is_that_of_torch() -> None:
    def curvature(function: nn.Module, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), x)
        return second

    x = torch.linspace(-3, 3, 31, dtype=torch.float64).requires_grad_()
    assert torch.allclose(curvature(ELU(), x), curvature(nn.ELU(), x), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 200, 300), (2, 3, 4, 5), (0, 3)])
def test_large_and_halved_numbers_are_those_of_torch(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (3 * torch.randn(shape)).to(dtype)
    expected = F.elu(x)
    maps = [x, x.contiguous(memory_format=torch.channels_last)] if x.ndim == 4 else [x]
    for values in (*maps, x.transpose(0, 1).transpose(0, 1)):
        assert torch.allclose(ELU()(values), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_in_place_it_overwrites_its_input_and_the_gradient_is_the_same() -> None:
    leaf = torch.randn(4, 3, 2, 2, requires_grad=True)
    expected = F.elu(2 * leaf)
    (slope,) = torch.autograd.grad(expected.square().sum(), leaf)
    doubled = 2 * leaf
    out = ELU(inplace=True)(doubled)
    assert out.data_ptr() == doubled.data_ptr()
    (found,) = torch.autograd.grad(out.square().sum(), leaf)
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(found, slope, atol=1e-5)


def test_an_overwritten_input_that_is_still_needed_is_noticed() -> None:
    leaf = torch.randn(4, requires_grad=True)
    squared = leaf.exp()  # its gradient needs its value
    out = ELU(inplace=True)(squared)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_in_place_activations_stay_in_place() -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), nn.ReLU(), nn.GELU())
    swap_activations(net)
    assert [m.inplace for m in net if isinstance(m, ELU)] == [True, False, False]


def test_its_input_does_not_change() -> None:
    x = torch.randn(10)
    before = x.clone()
    out = ELU()(x)
    assert torch.equal(x, before)
    assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.LeakyReLU(), nn.PReLU()],
)
def test_an_activation_between_layers_is_replaced(activation: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sequential(activation, nn.Conv2d(2, 2, 1)))
    assert swap_activations(net) == 1
    assert isinstance(net[1][0], ELU)  # type: ignore[index]


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick_gelu", "swish", "mish", "hard_mish", "prelu", "relu6"])
def test_timms_activations_are_replaced(name: str) -> None:
    layer = timm.layers.create_act.create_act_layer(name)
    assert layer is not None
    assert swap_activations(nn.Sequential(layer)) == 1


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh(), nn.Softmax(dim=1), nn.Identity()])
def test_gates_stay(gate: nn.Module) -> None:
    net = nn.Sequential(nn.ReLU(), gate)
    assert swap_activations(net) == 1
    assert net[1] is gate


def test_a_squeeze_excite_block_keeps_its_gate() -> None:
    block = timm.layers.squeeze_excite.SqueezeExcite(8)
    gate = block.gate
    assert swap_activations(block) == 1
    assert block.gate is gate


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0", "mobilenetv3_small_050"])
def test_no_other_activation_remains_in_a_timm_network(name: str) -> None:
    net = timm.create_model(name, num_classes=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_elu(net)
    kinds = {type(m).__name__ for m in net.modules()}
    assert "ELU" in kinds
    assert not kinds & {"ReLU", "ReLU6", "SiLU", "GELU", "Hardswish", "Swish", "GELUTanh", "HardSwishMe"}


def test_nothing_to_replace_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="activation='keep'"):
        to_elu(nn.Sequential(nn.Conv2d(1, 2, 1), nn.Sigmoid()))


def test_a_network_that_has_elu_already_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ELU())
        to_elu(net)
    assert type(net[1]) is nn.ELU


def test_a_shared_activation_is_replaced_in_every_place() -> None:
    shared = nn.ReLU()
    net = nn.Sequential(nn.Linear(2, 2), shared, nn.Linear(2, 2), shared, nn.Sequential(shared))
    assert swap_activations(net) == 3
    assert not [m for m in net.modules() if isinstance(m, nn.ReLU)]


def test_function_transforms_work() -> None:
    x = torch.linspace(-2, 2, 9)
    expected = torch.func.vmap(torch.func.grad(F.elu))(x)
    assert torch.allclose(torch.func.vmap(torch.func.grad(ELU()))(x), expected, atol=1e-6)
    assert torch.allclose(torch.func.jacrev(ELU())(x), torch.diag(expected), atol=1e-6)
