from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

import robustfpd as rf
from robustfpd import attacks
from robustfpd.attacks import adaptive
from robustfpd.config import NORMS, Norm
from robustfpd.errors import InputError


def test_names_are_sorted_and_all_can_be_had() -> None:
    assert attacks.names() == sorted(set(attacks.names()))
    published = {"fgsm", "pgd", "bim", "cw", "deepfool", "jsma", "zoo", "hopskipjump"}
    others = {"apgd-ce", "apgd-dlr", "apgd-t", "fab", "square", "autoattack", "autoattack-rand", "ddn", "fmn"}
    assert published | others <= set(attacks.names())
    assert attacks.get("pgd") is attacks.pgd
    assert all(attacks.get(name).name == name for name in attacks.names())


@pytest.mark.parametrize("name", attacks.names())
@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_that_is_not_offered_is_a_value_error_naming_those_that_are(
    name: str, norm: Norm, net: nn.Module, corners: Tensor
) -> None:
    attack = attacks.get(name)
    assert len(attack.norms) > 0
    if norm in attack.norms:
        return
    with pytest.raises(ValueError, match=f"{name} does not offer norm '{norm}'; it offers {', '.join(attack.norms)}$"):
        attack(net, corners, torch.zeros(12, dtype=torch.long), eps=0.1, norm=norm)


@pytest.mark.parametrize("name", attacks.names())
def test_every_attack_has_the_one_signature(name: str) -> None:
    parameters = inspect.signature(attacks.get(name)).parameters
    assert list(parameters)[:3] == ["classifier", "images", "labels"]
    assert {"eps", "norm", "generator"} <= {n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert parameters["eps"].default is inspect.Parameter.empty
    assert parameters["norm"].default == ("linf" if "linf" in attacks.get(name).norms else attacks.get(name).norms[0])


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "bim", "fgsm", "pgd"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_gradient_attack_raises_the_loss(name: str, norm: Norm, net: nn.Module, corners: Tensor) -> None:
    labels = net(corners).argmax(1)  # Auto-PGD leaves alone what is misclassified already
    found = attacks.get(name)(net, corners, labels, eps=0.2, norm=norm, generator=torch.Generator().manual_seed(0))
    loss = nn.CrossEntropyLoss(reduction="none")
    assert bool((loss(net(found), labels) > loss(net(corners), labels)).all())


def test_an_unknown_name_comes_with_near_ones() -> None:
    with pytest.raises(InputError, match="unknown attack 'pdg'; did you mean 'pgd'"):
        attacks.get("pdg")
    with pytest.raises(InputError, match=r"unknown attack 'zzz'; choose from .*bim.*fgsm and [0-9]+ more"):
        attacks.get("zzz")


def test_views_of_a_squashed_fpd_add_its_logits_before_the_tanh(corners: Tensor) -> None:
    model = rf.enhance("resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8).eval()
    views = adaptive.views(model.classifier())
    assert list(views) == [adaptive.LOGITS, adaptive.PRE_SQUASH]
    with torch.no_grad():
        plain, pre_squash = (views[v].eval()(corners) for v in views)
    torch.testing.assert_close(plain, pre_squash.tanh())
    assert list(adaptive.views(model.classifier(squash=False))) == [adaptive.LOGITS]


def test_a_plain_module_has_one_view_and_is_its_own_classifier(net: nn.Module) -> None:
    assert adaptive.views(net) == {adaptive.LOGITS: net}
    assert adaptive.as_classifier(net) is net


def test_views_leave_the_flags_of_a_partly_frozen_fpd() -> None:
    model = rf.enhance("resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8).train()
    model.backbone.eval()
    before = [m.training for m in model.modules()]
    adaptive.views(adaptive.as_classifier(model))
    assert [m.training for m in model.modules()] == before
