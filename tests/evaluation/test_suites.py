from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fpds import as_trained, gated
from torch import nn

import robustfpd as rf
from robustfpd import attacks
from robustfpd.attacks import adaptive
from robustfpd.attacks.autoattack import EOT_SAMPLES
from robustfpd.config import NORMS
from robustfpd.errors import InputError
from robustfpd.evaluation import suite_names
from robustfpd.evaluation.suites import AttackSpec, SuiteContext, attack_specs

if TYPE_CHECKING:
    from robustfpd.config import Norm

PUBLISHED: dict[Norm, list[str]] = {
    "linf": ["fgsm", "pgd", "bim", "deepfool", "cw", "hopskipjump"],
    "l2": ["fgsm", "pgd", "bim", "deepfool", "cw", "jsma", "zoo", "hopskipjump"],
    "l1": ["fgsm", "pgd", "bim", "jsma"],
}


def _views(head: str = "tanh", protocol: str = "corrected") -> tuple[str, ...]:
    options: dict[str, Any] = {"num_classes": 3, "in_channels": 1, "image_size": 8, "pyramid_channels": 8}
    model = as_trained(rf.enhance("resnet_mini", head=head, **gated(protocol=protocol, **options))).eval()
    return tuple(adaptive.adaptive_views(model.classifier(), torch.rand(2, 1, 8, 8)))


def _options(planned: AttackSpec) -> tuple[object, ...]:
    return (planned.attack, *planned.options.items())


def test_suites_have_names() -> None:
    assert suite_names() == sorted(suite_names())
    assert {"quick", "first-look", "published", "standard", "full"} <= set(suite_names())


@pytest.mark.parametrize("suite", suite_names())
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("random", [False, True])
def test_every_suite_plans_known_attacks_under_labels_of_their_own(suite: str, norm: Norm, random: bool) -> None:
    views = _views()
    planned = attack_specs(suite, SuiteContext(norm, views, ("baseline", "other"), random))
    labels = [p.label for p in planned]
    assert len(set(labels)) == len(labels) > 0
    assert {p.attack for p in planned} <= set(attacks.names())
    assert {p.view for p in planned} <= {*views, "baseline", "other"}
    assert all(norm in attacks.get(p.attack).norms for p in planned)


@pytest.mark.parametrize("suite", ["first-look", "quick", "pgd-100"])
@pytest.mark.parametrize("norm", NORMS)
def test_an_fpd_gets_every_attack_before_its_tanh_too_and_a_plain_module_none(suite: str, norm: Norm) -> None:
    defended, plain = attack_specs(suite, SuiteContext(norm, _views())), attack_specs(suite, SuiteContext(norm))
    kinds = [{_options(p) for p in defended if p.view == v} for v in (adaptive.LOGITS, adaptive.PRE_SQUASH)]
    assert kinds[0] == kinds[1] != set()
    assert [p for p in defended if p.view == adaptive.LOGITS] == plain


@pytest.mark.parametrize("suite", ["standard", "full"])
@pytest.mark.parametrize("random", [False, True])
def test_what_is_asked_of_gradients_is_asked_before_the_tanh(suite: str, random: bool) -> None:
    planned = attack_specs(suite, SuiteContext("linf", _views(), randomised=random))
    before = {_options(p) for p in planned if p.view == adaptive.PRE_SQUASH}
    after = [p for p in planned if p.view == adaptive.LOGITS and attacks.get(p.attack).access == "gradients"]
    assert after != []
    assert {_options(p) for p in after} <= before


@pytest.mark.parametrize("suite", ["quick", "standard", "full", "pgd-100"])
@pytest.mark.parametrize("protocol", ["improved", "corrected"])
def test_an_fpd_gets_the_adaptive_views(suite: str, protocol: str) -> None:
    views = _views(protocol=protocol)
    assert {p.view for p in attack_specs(suite, SuiteContext("linf", views))} == set(views)
    expected = {"logits", "pre-squash", "bpda-restoration", "bpda-denoising", "front-pass", "joint", "joint-hidden"}
    assert set(views) == expected | ({"back-pass"} if protocol == "corrected" else set())


def test_an_fpd_without_a_tanh_has_no_other_logits() -> None:
    views = _views("spectral")
    assert adaptive.PRE_SQUASH not in views
    planned = attack_specs("standard", SuiteContext("linf", views))
    assert {p.view for p in planned} == set(views)
    assert "apgd-t" in {p.attack for p in planned if p.view == adaptive.LOGITS}


@pytest.mark.parametrize("norm", NORMS)
def test_standard_is_autoattack_with_more_and_expensive_attacks_come_last(norm: Norm) -> None:
    planned = attack_specs("standard", SuiteContext(norm))
    names = [p.attack for p in planned]
    assert {"apgd-ce", "apgd-t", "fab-t", "square"} <= set(names)
    assert names[-2:] == ["fab-t", "square"]
    shares = [p.share for p in planned]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1 > shares[-1]
    options = {p.attack: dict(p.options) for p in planned}
    assert options["apgd-ce"] == {"restarts": 5 if norm == "l1" else 1}
    assert options["apgd-t"] == {"targets": 5 if norm == "l1" else 9}
    full = attack_specs("full", SuiteContext(norm))
    assert all(p.share == 1 for p in full)


def test_a_random_classifier_has_its_gradients_averaged() -> None:
    planned = attack_specs("standard", SuiteContext(randomised=True))
    averaged = [p.attack for p in planned if p.options.get("eot") == EOT_SAMPLES == 20]
    assert averaged == ["apgd-ce", "apgd-dlr"]
    assert all("eot" not in p.options for p in attack_specs("standard", SuiteContext()))


@pytest.mark.parametrize("suite", ["quick", "standard", "full", "pgd-100", "published"])
def test_every_surrogate_is_attacked(suite: str) -> None:
    planned = attack_specs(suite, SuiteContext(surrogates=("baseline", "other")))
    assert {p.view for p in planned} == {adaptive.LOGITS, "baseline", "other"}
    for name in ("baseline", "other"):
        assert any(p.label == f"PGD-40, transfer from {name}" or "PGD-40, no" in p.label for p in planned)
        assert all(f"transfer from {name}" in p.label for p in planned if p.view == name)


@pytest.mark.parametrize(("suite", "steps", "step_size"), [("published", 40, 2 / 255), ("published-mnist", 100, 0.1)])
@pytest.mark.parametrize("norm", NORMS)
def test_published_suites_hold_the_papers_list_on_the_squashed_logits_alone(
    suite: str, steps: int, step_size: float, norm: Norm
) -> None:
    planned = attack_specs(suite, SuiteContext(norm, _views()))
    assert {p.view for p in planned} == {adaptive.LOGITS}
    assert [p.attack for p in planned] == PUBLISHED[norm]
    fixed = (steps, step_size) if norm == "linf" else (100, 0.1)
    assert dict(planned[1].options) == {"steps": fixed[0], "step_size": fixed[1], "random_start": False}
    assert dict(planned[2].options) == {"steps": 100}


def test_the_papers_attacks_are_all_there_in_some_norm() -> None:
    paper = {"fgsm", "pgd", "bim", "cw", "deepfool", "jsma", "zoo", "hopskipjump"}
    assert {p.attack for norm in PUBLISHED for p in attack_specs("published", SuiteContext(norm))} == paper


def test_an_unknown_suite_comes_with_near_ones() -> None:
    with pytest.raises(InputError, match="unknown suite 'quik'; did you mean 'quick'"):
        attack_specs("quik", SuiteContext())
    with pytest.raises(InputError, match=r"unknown suite 'zzz'; choose from .*first-look.*quick"):
        attack_specs("zzz", SuiteContext())


def test_a_plain_module_without_dead_parts_has_itself_alone() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    assert list(adaptive.adaptive_views(net, torch.rand(2, 1, 8, 8))) == [adaptive.LOGITS]
