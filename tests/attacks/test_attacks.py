from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.config import NORMS, Norm
from robustfpd.errors import InputError


def test_names_are_sorted_and_get_returns_each() -> None:
    assert attacks.names() == sorted(set(attacks.names()))
    published = {"fgsm", "pgd", "bim", "cw", "deepfool", "jsma", "zoo", "hopskipjump"}
    others = {"apgd-ce", "apgd-dlr", "apgd-t", "fab", "square", "autoattack", "ddn", "fmn"}
    assert published | others <= set(attacks.names())
    assert attacks.get("pgd") is attacks.pgd
    assert all(attacks.get(name).name == name for name in attacks.names())


@pytest.mark.parametrize("name", attacks.names())
@pytest.mark.parametrize("norm", NORMS)
def test_an_unsupported_norm_is_an_error_that_lists_the_supported_ones(
    name: str, norm: Norm, net: nn.Module, corners: Tensor
) -> None:
    attack = attacks.get(name)
    assert len(attack.norms) > 0
    if norm in attack.norms:
        return
    with pytest.raises(ValueError, match=f"{name} does not offer norm '{norm}'; it offers {', '.join(attack.norms)}$"):
        attack(net, corners, torch.zeros(12, dtype=torch.long), eps=0.1, norm=norm)


@pytest.mark.parametrize("name", attacks.names())
def test_every_attack_has_the_common_signature(name: str) -> None:
    parameters = inspect.signature(attacks.get(name)).parameters
    assert list(parameters)[:3] == ["classifier", "images", "labels"]
    assert {"eps", "norm", "generator"} <= {n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert parameters["eps"].default is inspect.Parameter.empty
    assert parameters["norm"].default == ("linf" if "linf" in attacks.get(name).norms else attacks.get(name).norms[0])


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "bim", "fgsm", "pgd"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_gradient_attack_raises_the_loss(name: str, norm: Norm, net: nn.Module, corners: Tensor) -> None:
    labels = net(corners).argmax(1)  # Auto-PGD does not attack misclassified images
    adversarial = attacks.get(name)(
        net, corners, labels, eps=0.2, norm=norm, generator=torch.Generator().manual_seed(0)
    )
    loss = nn.CrossEntropyLoss(reduction="none")
    assert bool((loss(net(adversarial), labels) > loss(net(corners), labels)).all())


def test_an_unknown_name_is_an_error_with_the_closest_names() -> None:
    with pytest.raises(InputError, match="unknown attack 'pdg'; did you mean 'pgd'"):
        attacks.get("pdg")
    with pytest.raises(InputError, match=r"unknown attack 'zzz'; choose from .*bim.*fgsm.* and [0-9]+ more"):
        attacks.get("zzz")
