from __future__ import annotations

import pytest

from robustfpd.errors import InputError, MissingDataError, unknown_name


def test_near_names_come_without_the_far_ones() -> None:
    error = unknown_name("recipe", "digit/mini", ["digits/mini", "zebra"])
    assert str(error) == "unknown recipe 'digit/mini'; did you mean 'digits/mini'?"


def test_without_a_near_name_the_choices_are_listed_sorted_and_once() -> None:
    error = unknown_name("attack", "qqqq", ["pgd", "fgsm", "bim", "pgd"])
    assert str(error) == "unknown attack 'qqqq'; choose from bim, fgsm, pgd"


def test_without_choices_it_says_so() -> None:
    assert str(unknown_name("run", "x", [])) == "unknown run 'x'; there are none to choose from"


@pytest.mark.parametrize(("count", "rest"), [(12, ""), (13, " and 1 more"), (20, " and 8 more")])
def test_a_long_list_is_cut_and_the_rest_counted(count: int, rest: str) -> None:
    names = [f"name{i:02}" for i in range(count)]
    message = str(unknown_name("thing", "%%%", names))
    assert message == f"unknown thing '%%%'; choose from {', '.join(names[:12])}{rest}"


def test_what_was_found_may_be_anything() -> None:
    assert "unknown norm 3;" in str(unknown_name("norm", 3, ["linf", "l2"]))
    assert "\n" not in str(unknown_name("norm", "a\nb", ["linf", "l2"]))


def test_errors_are_value_errors() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(MissingDataError, InputError)
    assert isinstance(unknown_name("a", "b", ["c"]), InputError)
