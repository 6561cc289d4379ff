from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.fpds import as_trained, corrected_training, gated
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from robustfpd.attacks import pgd
from robustfpd.errors import InputError
from robustfpd.models import FPD, enhance
from robustfpd.training.fabric import checkpoint_activations, synchronise_batch_norm
from robustfpd.training.steps import two_phase_step


def _model(protocol: str = "improved") -> FPD:
    options = gated(num_classes=4, in_channels=1, image_size=8, pyramid_channels=8, protocol=protocol)
    model = enhance("resnet_mini", **options)
    return as_trained(model).train()


PROTOCOLS = pytest.mark.parametrize("protocol", ["improved", "corrected"])


def _batch() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(3)
    return torch.rand(6, 1, 8, 8, generator=draws), torch.tensor([0, 1, 2, 3, 0, 1])


def _objective(model: FPD) -> Tensor:
    images, labels = _batch()
    out = model(images)
    return F.cross_entropy(out.logits, labels) + F.mse_loss(out.restored, images)


@PROTOCOLS
def test_gradients_and_statistics_are_those_without_it(protocol: str) -> None:
    plain, checkpointed = _model(protocol), _model(protocol)
    checkpoint_activations(checkpointed)
    for model in (plain, checkpointed):
        _objective(model).backward()  # type: ignore[no-untyped-call]
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), name
    for (name, x), y in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.allclose(x, y, rtol=1e-5), name
    assert all(m.momentum == 0.1 for m in checkpointed.modules() if isinstance(m, nn.BatchNorm2d))


@PROTOCOLS
def test_fewer_activations_are_saved_for_the_backward_pass(protocol: str) -> None:
    sizes = []
    for activation_checkpointing in (False, True):
        model = _model(protocol)
        if activation_checkpointing:
            checkpoint_activations(model)
        saved: dict[int, int] = {}

        def pack(x: Tensor, saved: dict[int, int] = saved) -> Tensor:
            if not isinstance(x, nn.Parameter):
                saved[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            _objective(model)
        sizes.append(sum(saved.values()))
    assert sizes[1] < 0.8 * sizes[0]


@pytest.mark.parametrize("second_pass", ["detached", "joint", "through"])
@PROTOCOLS
def test_both_phases_train_the_same(second_pass: str, protocol: str) -> None:
    config = corrected_training(threshold=1e9, second_pass=second_pass, middle_noise=0.1)
    images, labels = _batch()
    ends = []
    for activation_checkpointing in (False, True):
        model = copy.deepcopy(_model(protocol))
        if activation_checkpointing:
            checkpoint_activations(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def update(
            loss: Tensor, *, only: object = None, retain_graph: bool = False, optimizer: torch.optim.SGD = optimizer
        ) -> None:
            optimizer.zero_grad()
            loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
            if (
                not retain_graph
            ):  # after a step `through` would recompute with other weights; only the statistics are compared
                optimizer.step()

        two_phase_step(model, images, images, labels, update, config, generator=torch.Generator().manual_seed(0))
        ends.append(model.state_dict())
    assert all(torch.allclose(ends[0][k].float(), ends[1][k].float(), rtol=1e-3, atol=1e-5) for k in ends[0])
    seen = {int(v) for k, v in ends[1].items() if "num_batches" in k}
    assert seen == ({2} if protocol == "improved" else {4})  # with shared averages, both passes of both phases count


def test_an_attack_on_a_checkpointed_model_in_evaluation_mode_finds_the_same() -> None:
    images, labels = _batch()
    plain, checkpointed = _model().eval(), _model().eval()
    checkpoint_activations(checkpointed)
    adversarial = [pgd(m.classifier(), images, labels, eps=0.1, steps=3) for m in (plain, checkpointed)]
    assert torch.allclose(adversarial[0], adversarial[1], atol=1e-5)


def test_dense_blocks_recompute_from_the_list_of_the_forward_pass() -> None:
    model = enhance(
        "densenet121", num_classes=4, in_channels=1, image_size=32, pyramid_channels=8, denoise="none"
    ).train()
    checkpoint_activations(model)
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    model(images).logits.sum().backward()
    assert all(p.grad is not None for p in model.head.parameters())


class EndsInNorm(nn.Module):
    """A network whose first stage is a batch norm, and whose second one has timm's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), BatchNormAct2d(8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.norm(self.stem(x)))
        return out


def test_synchronised_batch_norm_keeps_names_weights_and_hooks() -> None:
    model = enhance(EndsInNorm(), stages=("norm", "block"), num_classes=4, in_channels=1, image_size=8)
    expected = copy.deepcopy(model)
    synchronise_batch_norm(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 2
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    expected.load_state_dict(model.state_dict())
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for a, b in zip(expected.eval()(images), model.eval()(images), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_batch_norm_that_overrides_forward_is_refused() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return input

    with pytest.raises(InputError, match=r"0 is a Odd.*leave out sync_batchnorm=true"):
        synchronise_batch_norm(nn.Sequential(Odd(3)))
