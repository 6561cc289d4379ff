from __future__ import annotations

import pytest
from torch import nn

import robustfpd as rf
from robustfpd import attacks
from robustfpd.attacks import adaptive
from robustfpd.errors import InputError
from robustfpd.evaluation import plan, suite_names


def _fpd(head: str = "tanh") -> rf.FPD:
    return rf.enhance("resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8, head=head)


def test_suites_have_names() -> None:
    assert suite_names() == sorted(suite_names())
    assert {"quick", "first-look"} <= set(suite_names())


@pytest.mark.parametrize("suite", suite_names())
def test_every_suite_plans_known_attacks_under_labels_of_their_own(suite: str) -> None:
    planned = plan(suite, _fpd().classifier())
    labels = [p.label for p in planned]
    assert len(set(labels)) == len(labels) > 0
    assert {p.attack for p in planned} <= set(attacks.names())


@pytest.mark.parametrize("suite", [name for name in suite_names() if not name.startswith("published")])
def test_an_fpd_gets_every_attack_before_its_tanh_too_and_a_plain_module_none(suite: str) -> None:
    defended, plain = plan(suite, _fpd().classifier()), plan(suite, nn.Linear(3, 3))
    kinds = [{(p.attack, tuple(p.options.items())) for p in defended if p.view == v} for v in _VIEWS]
    assert kinds[0] == kinds[1]
    assert [p for p in defended if p.view == adaptive.PLAIN] == plain


@pytest.mark.parametrize(("suite", "steps", "step_size"), [("published", 40, 2 / 255), ("published-mnist", 100, 0.1)])
def test_published_suites_see_the_squashed_logits_alone_and_start_at_the_image(
    suite: str, steps: int, step_size: float
) -> None:
    planned = plan(suite, _fpd().classifier())
    assert [(p.attack, p.view) for p in planned] == [("fgsm", adaptive.PLAIN), ("pgd", adaptive.PLAIN)]
    assert dict(planned[1].options) == {"steps": steps, "step_size": step_size, "random_start": False}


_VIEWS = (adaptive.PLAIN, adaptive.UNSQUASHED)


def test_an_unknown_suite_comes_with_near_ones() -> None:
    with pytest.raises(InputError, match="unknown suite 'quik'; did you mean 'quick'"):
        plan("quik", nn.Identity())
    with pytest.raises(InputError, match=r"unknown suite 'zzz'; choose from .*first-look.*quick"):
        plan("zzz", nn.Identity())
