from __future__ import annotations

import importlib.util
import inspect
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.attacks.base import QueryCounter, attack, record_queries
from robustfpd.errors import InputError

if TYPE_CHECKING:
    from robustfpd.config import Norm


def _custom(body: Any = None, **options: Any) -> Any:
    @attack("custom", **options)
    def custom(
        classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 3,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Run the custom attack."""
        if body is not None:
            arguments = {"images": images, "labels": labels, "eps": eps, "norm": norm, "steps": steps}
            body(classifier=classifier, generator=generator, **arguments)
        return images.clone()

    return custom


X, Y = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
NET = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def test_an_attack_has_its_metadata() -> None:
    custom = _custom(norms=("l2", "l1"), minimal=True, access="scores", library="foolbox")
    assert (custom.name, custom.norms, custom.minimal, custom.access) == ("custom", ("l2", "l1"), True, "scores")
    assert custom.library == "foolbox"
    assert custom.__doc__ == "Run the custom attack."
    assert custom.__name__ == "custom"
    assert list(inspect.signature(custom).parameters)[:4] == ["classifier", "images", "labels", "eps"]


def test_arguments_reach_the_attack_checked_and_complete() -> None:
    seen: dict[str, Any] = {}
    custom = _custom(seen.update)
    images = X.clone().requires_grad_()
    custom(NET, images, Y.int(), eps=np.float32(0.25))
    assert seen["eps"] == 0.25
    assert isinstance(seen["eps"], float)
    assert not seen["images"].requires_grad
    assert seen["labels"].dtype == torch.long
    assert (seen["norm"], seen["steps"]) == ("linf", 3)
    assert seen["generator"].initial_seed() == 0
    draws = torch.Generator().manual_seed(9)
    custom(NET, images=X, labels=Y, eps=0.1, generator=draws, steps=7)
    assert seen["generator"] is draws
    assert seen["steps"] == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 8.0}, "eps must be at most 1 in linf"),
        ({"eps": 0}, "eps must be a positive number, found 0"),
        ({"eps": True}, "eps must be a positive number, found True"),
        ({"eps": None}, "eps must be a positive number, found None"),
        ({"norm": "l7"}, "unknown norm 'l7'"),
        ({"norm": "l1"}, "custom does not offer norm 'l1'; it offers linf, l2"),
        ({"images": X * 255}, "divide by 255"),
        ({"images": X[0]}, "images must be N×C×H×W"),
        ({"images": X.numpy()}, "images must be a torch.Tensor, found ndarray"),
        ({"labels": Y[:2]}, r"labels must have shape \(3,\)"),
        ({"labels": Y.float()}, "labels must be integers"),
        ({"labels": Y - 1}, "labels must not be negative"),
    ],
)
def test_invalid_inputs_are_refused_before_the_attack_runs(options: dict[str, Any], message: str) -> None:
    called: list[Any] = []
    custom = _custom(lambda **arguments: called.append(arguments), norms=("linf", "l2"))
    with pytest.raises(InputError, match=message):
        custom(NET, **{"images": X, "labels": Y, "eps": 0.1, **options})
    assert called == []


def test_unknown_and_missing_arguments_are_type_errors() -> None:
    with pytest.raises(TypeError, match="eps"):
        _custom()(NET, X, Y)
    with pytest.raises(TypeError, match="colour"):
        _custom()(NET, X, Y, eps=0.1, colour="red")


def test_a_missing_library_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"attack custom .*needs foolbox; install it with: pip install 'robustfpd\[att"
    ):
        _custom(library="foolbox")(NET, X, Y, eps=0.1)
    with pytest.raises(InputError, match="needs adversarial-robustness-toolbox; install it with"):
        attacks.get("hopskipjump")(NET, X, Y, eps=0.1)
    assert _custom()(NET, X, Y, eps=0.1).shape == X.shape


def test_only_gradient_attacks_refuse_inference_mode() -> None:
    with torch.inference_mode():
        with pytest.raises(InputError, match="inference_mode"):
            _custom()(NET, X, Y, eps=0.1)
        assert _custom(access="decisions")(NET, X, Y, eps=0.1).shape == X.shape


def _states() -> list[Any]:
    legacy: Any = np.random.get_state()  # noqa: NPY002 - libraries use this one
    return [torch.get_rng_state().tolist(), legacy[1].tolist(), legacy[2], random.getstate()]


@pytest.mark.parametrize("fails", [False, True])
def test_global_random_states_follow_the_generator_and_are_restored(fails: bool) -> None:
    values: list[tuple[float, float, float]] = []

    def draws(**arguments: Any) -> None:
        values.append((float(torch.rand(1)), float(np.random.rand()), random.random()))  # noqa: NPY002
        if fails:
            raise RuntimeError("no")

    custom, before = _custom(draws), _states()
    for seed in (1, 1, 2):
        source = torch.Generator().manual_seed(seed)
        state = source.get_state()
        try:
            custom(NET, X, Y, eps=0.1, generator=source)
        except RuntimeError:
            assert fails
        assert torch.equal(source.get_state(), state)  # nothing was drawn from it
        assert _states() == before
    first, again, other = values
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_the_classifier_is_frozen_and_in_evaluation_mode_during_the_attack(fails: bool) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 3)).train()
    net[3].eval()
    frozen = net[1].bias
    frozen.requires_grad_(False)
    weight = net[4].weight
    assert isinstance(weight, Tensor)
    weight.grad = gradient = torch.full_like(weight, 2.0)
    seen: list[Any] = []

    def inspect_state(classifier: nn.Module, **arguments: Any) -> None:
        seen.append([m.training for m in classifier.modules()])
        seen.append([(p.requires_grad, p.grad) for p in classifier.parameters()])
        for p in classifier.parameters():  # as libraries do
            p.requires_grad_(True)
            p.grad = torch.ones_like(p)
        classifier.train()
        if fails:
            raise RuntimeError("no")

    try:
        _custom(inspect_state)(net, X, Y, eps=0.1)
    except RuntimeError:
        assert fails
    assert not any(seen[0])
    assert set(seen[1]) == {(False, None)}
    assert [m.training for m in net.modules()] == [True, True, True, True, False, True]
    assert weight.grad is gradient
    assert bool((gradient == 2).all())
    assert [p.requires_grad for p in net.parameters()] == [True, False, True, True, True, True]
    assert all(p.grad is None for p in net.parameters() if p is not weight)


def test_query_counter_counts_forward_and_backward_passes() -> None:
    counter = QueryCounter(NET)
    x = X.clone().requires_grad_()
    logits = counter(x)
    logits.sum().backward()
    with torch.no_grad():
        counter(X[:2])
    assert (counter.forward_passes, counter.backward_passes) == (5, 3)
    out = counter(x[:1])
    for k in range(3):
        torch.autograd.grad(out[0, k], x, retain_graph=True)
    assert (counter.forward_passes, counter.backward_passes) == (6, 6)
    record_queries(counter, torch.tensor([4, 5]))
    record_queries(NET, torch.tensor([4, 5]))
    assert counter.per_image is not None
    assert counter.per_image.tolist() == [4, 5]
    counter.reset()
    assert counter.forward_passes == counter.backward_passes == 0
    assert counter.per_image is None
