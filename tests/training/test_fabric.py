from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.attacks import pgd
from robustfpd.config import TrainingConfig
from robustfpd.errors import InputError
from robustfpd.models import FPD, enhance
from robustfpd.training.fabric import checkpoint_activations, synchronise_batch_norm
from robustfpd.training.steps import two_phase_step


def _model() -> FPD:
    return enhance("resnet_mini", num_classes=4, in_channels=1, image_size=8, pyramid_channels=8).train()


def _batch() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(3)
    return torch.rand(6, 1, 8, 8, generator=draws), torch.tensor([0, 1, 2, 3, 0, 1])


def _objective(model: FPD) -> Tensor:
    images, labels = _batch()
    out = model(images)
    return F.cross_entropy(out.logits, labels) + F.mse_loss(out.restored, images)


def test_gradients_and_statistics_are_those_without_it() -> None:
    plain, recomputed = _model(), _model()
    checkpoint_activations(recomputed)
    for model in (plain, recomputed):
        _objective(model).backward()  # type: ignore[no-untyped-call]
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), name
    for (name, x), y in zip(plain.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.allclose(x, y, rtol=1e-5), name
    assert all(m.momentum == 0.1 for m in recomputed.modules() if isinstance(m, nn.BatchNorm2d))


def test_less_is_kept_between_the_passes() -> None:
    kept = []
    for activation_checkpointing in (False, True):
        model = _model()
        if activation_checkpointing:
            checkpoint_activations(model)
        seen: dict[int, int] = {}

        def pack(x: Tensor, seen: dict[int, int] = seen) -> Tensor:
            if not isinstance(x, nn.Parameter):
                seen[x.data_ptr()] = x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            _objective(model)
        kept.append(sum(seen.values()))
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.parametrize("second_pass", ["detached", "joint", "through"])
def test_both_phases_train_the_same(second_pass: str) -> None:
    config = TrainingConfig(threshold=1e9).model_copy(update={"second_pass": second_pass})
    images, labels = _batch()
    ends = []
    for activation_checkpointing in (False, True):
        model = copy.deepcopy(_model())
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
            ):  # with `through` the weights would be recomputed with; only the statistics are compared
                optimizer.step()

        two_phase_step(model, images, images, labels, update, config)
        ends.append(model.state_dict())
    assert all(torch.allclose(ends[0][k].float(), ends[1][k].float(), rtol=1e-3, atol=1e-5) for k in ends[0])
    assert {int(v) for k, v in ends[1].items() if "num_batches" in k} == {4}


def test_an_attack_in_evaluation_mode_keeps_less_too_and_finds_the_same() -> None:
    images, labels = _batch()
    plain, recomputed = _model().eval(), _model().eval()
    checkpoint_activations(recomputed)
    found = [pgd(m.classifier(), images, labels, eps=0.1, steps=3) for m in (plain, recomputed)]
    assert torch.allclose(found[0], found[1], atol=1e-5)


def test_dense_blocks_get_their_list_as_it_was() -> None:
    model = enhance(
        "densenet121", num_classes=4, in_channels=1, image_size=32, pyramid_channels=8, denoise="none"
    ).train()
    checkpoint_activations(model)
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    model(images).logits.sum().backward()
    assert all(p.grad is not None for p in model.head.parameters())


def test_synchronised_batch_norm_keeps_names_weights_and_hooks() -> None:
    model = enhance("efficientnet_b0", num_classes=4, in_channels=1, image_size=32, pyramid_channels=8)
    before = copy.deepcopy(model)
    synchronise_batch_norm(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    before.load_state_dict(model.state_dict())
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for expected, output in zip(before.eval()(images), model.eval()(images), strict=True):
        assert torch.allclose(expected, output, atol=1e-5)


def test_a_batch_norm_that_overrides_forward_is_refused() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return input

    with pytest.raises(InputError, match=r"0 is a Odd.*leave out sync_batchnorm=true"):
        synchronise_batch_norm(nn.Sequential(Odd(3)))
