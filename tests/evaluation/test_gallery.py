from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.evaluation.conftest import install_suite
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.errors import InputError
from robustfpd.evaluation import EvaluationObserver, EvaluationProgress, EvaluationRecord
from robustfpd.evaluation.gallery import Gallery, GalleryImage, GalleryIndex, gallery_folder, read_gallery, to_picture
from robustfpd.evaluation.suites import AttackSpec

Digits = tuple[nn.Module, Tensor, Tensor]
Evaluate = Callable[..., tuple[EvaluationRecord, Path]]
LIMIT = 8


@pytest.fixture
def evaluate(digits: Digits, tmp_path: Path) -> Evaluate:
    net, images, labels = digits

    def run(classifier: nn.Module = net, **options: Any) -> tuple[EvaluationRecord, Path]:
        given = {"suite": "first-look", "eps": (0.05, 0.1), "out_dir": tmp_path, "gallery": LIMIT, "batch_size": 16}
        record = rf.evaluate(classifier, (images, labels), **{**given, **options})
        return record, gallery_folder(tmp_path / "record.json")

    return run


@pytest.fixture(scope="module")
def evaluated(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluationRecord, Path]:
    """The record and the gallery's folder of one evaluation, for tests that only read them."""
    folder = tmp_path_factory.mktemp("gallery")
    options: dict[str, Any] = {"suite": "first-look", "eps": (0.05, 0.1), "gallery": LIMIT, "batch_size": 16}
    record = rf.evaluate(digits[0], digits[1:], out_dir=folder, **options)
    return record, gallery_folder(folder / "record.json")


def _picture(folder: Path, gallery_image: GalleryImage, name: Any) -> Tensor:
    return torch.from_numpy(np.array(Image.open(folder / gallery_image.file(name)), dtype=np.float32)) / 255


def _misclassified(record: EvaluationRecord) -> dict[int, tuple[int, str, float, int]]:
    """Of each misclassified image: number, name and radius of the attack, and the prediction."""
    order = list(dict.fromkeys((r.attack, r.eps) for r in record.ledger))
    found: dict[int, tuple[int, str, float, int]] = {}
    for r in record.ledger:
        if r.outcome == "misclassified" and r.attack != "clean":
            found.setdefault(r.image, (order.index((r.attack, r.eps)), r.attack, r.eps, r.adversarial_prediction))
    return found


def test_the_first_misclassified_images_are_shown_as_the_ledger_has_them(
    evaluated: tuple[EvaluationRecord, Path],
) -> None:
    record, folder = evaluated
    misclassified, shown = _misclassified(record), read_gallery(folder)
    assert len(misclassified) > LIMIT
    assert len(shown.misclassified) == LIMIT
    for gallery_image in shown.misclassified:
        assert gallery_image.misclassified
        expected = (gallery_image.attack, gallery_image.eps, gallery_image.adversarial_prediction)
        assert expected == misclassified[gallery_image.image][1:]
    latest = max(misclassified[e.image][0] for e in shown.misclassified)
    others = misclassified.keys() - {e.image for e in shown.misclassified}
    assert latest <= min(misclassified[image][0] for image in others)
    places = [misclassified[e.image][0] for e in shown.misclassified]
    assert places == sorted(places)


def test_images_of_one_attack_are_drawn_at_random(evaluate: Evaluate) -> None:
    """Data often come sorted by class: the first ones would be all of one."""
    record, folder = evaluate(eps=0.3)
    misclassified, shown = _misclassified(record), [e.image for e in read_gallery(folder).misclassified]
    same_attack = sorted(image for image, (place, *_) in misclassified.items() if place == misclassified[shown[0]][0])
    assert len(same_attack) > 3 * LIMIT
    assert shown != same_attack[:LIMIT]


def test_survivors_show_the_largest_margin(evaluated: tuple[EvaluationRecord, Path]) -> None:
    record, folder = evaluated
    robust = read_gallery(folder).robust
    assert 0 < len(robust) <= LIMIT
    for gallery_image in robust:
        rows = [r for r in record.ledger if r.image == gallery_image.image and r.attack != "clean"]
        assert {r.outcome for r in rows} == {"robust"}
        last = [r for r in rows if r.eps == 0.1]
        assert gallery_image.attack == max(last, key=lambda r: r.margin).attack
        assert gallery_image.adversarial_prediction == gallery_image.label == gallery_image.clean_prediction


def test_pictures_show_image_point_and_perturbation(digits: Digits, evaluate: Evaluate) -> None:
    _, images, _ = digits
    _, folder = evaluate()
    shown = read_gallery(folder)
    for gallery_image in (*shown.misclassified, *shown.robust):
        clean, adversarial = (_picture(folder, gallery_image, name) for name in ("clean", "adversarial"))
        torch.testing.assert_close(clean, images[gallery_image.image, 0], atol=1 / 500, rtol=0)
        delta = adversarial - clean
        assert float(delta.abs().max()) <= gallery_image.eps + 1 / 250
        magnified = _picture(folder, gallery_image, "perturbation") - 0.5
        torch.testing.assert_close(magnified / gallery_image.amplification, delta, atol=1 / 250, rtol=0)
        assert float(magnified.abs().max()) == pytest.approx(0.5, abs=1 / 250)
        assert not gallery_image.has_restored


def test_an_fpd_has_pictures_of_its_restorations(
    monkeypatch: pytest.MonkeyPatch, digits: Digits, tmp_path: Path
) -> None:
    install_suite(monkeypatch, AttackSpec("FGSM", "fgsm"))
    _, images, labels = digits
    fpd = rf.enhance("resnet_mini", num_classes=10, in_channels=1, image_size=8, pyramid_channels=8)
    fpd.train()(images)
    rf.evaluate(fpd, (images, labels), suite="ours", eps=0.2, out_dir=tmp_path, gallery=2)
    folder = gallery_folder(tmp_path / "record.json")
    shown = read_gallery(folder)
    fpd.eval()
    assert all(e.has_restored for e in (*shown.misclassified, *shown.robust))
    for gallery_image in [*shown.misclassified, *shown.robust][:2]:
        seen = fpd.restore(_picture(folder, gallery_image, "adversarial")[None, None])[0].clamp(0, 1)
        expected = _picture(folder, gallery_image, "restored")[None]
        assert float((seen - expected).detach().abs().max()) < 0.05  # the adversarial image was rounded to 8 bits


def test_the_landscape_is_right_at_the_image_and_wrong_at_the_adversarial_point(
    evaluated: tuple[EvaluationRecord, Path],
) -> None:
    _, folder = evaluated
    shown = read_gallery(folder)
    landscape = shown.landscape
    assert landscape is not None
    assert (landscape.image, landscape.attack, landscape.eps) == (
        shown.misclassified[0].image, shown.misclassified[0].attack, shown.misclassified[0].eps
    )  # fmt: skip
    middle = min(range(len(landscape.across)), key=lambda i: abs(landscape.across[i]))
    here, there = (min(range(21), key=lambda i: abs(landscape.along[i] - place)) for place in (0, 1))
    assert landscape.margin[middle][here] < 0 < landscape.margin[middle][there]


def test_the_gallery_changes_nothing_of_the_record(digits: Digits, evaluate: Evaluate, tmp_path: Path) -> None:
    _, images, labels = digits
    with_, _ = evaluate()
    without = rf.evaluate(digits[0], (images, labels), suite="first-look", eps=(0.05, 0.1), batch_size=16)
    assert [r.model_copy(update={"seconds": 0.0}) for r in with_.ledger] == [
        r.model_copy(update={"seconds": 0.0}) for r in without.ledger
    ]
    assert with_.verdict == without.verdict
    assert (with_.forward_passes, with_.backward_passes) == (without.forward_passes, without.backward_passes)


@pytest.mark.parametrize("options", [{"gallery": 0}, {"out_dir": None}])
def test_no_gallery_without_images_or_folder(evaluate: Evaluate, options: dict[str, Any], tmp_path: Path) -> None:
    _, folder = evaluate(**options)
    assert not folder.exists()
    assert (tmp_path / "record.json").is_file() is ("out_dir" not in options)


def test_an_evaluation_that_was_killed_keeps_what_it_had(evaluate: Evaluate) -> None:
    class Killed(Exception):
        pass

    def kill(stage: EvaluationProgress) -> None:
        if stage.number == 3:
            raise Killed

    with pytest.raises(Killed):
        evaluate(observer=EvaluationObserver(on_attack=kill))
    record, folder = evaluate()
    shown, misclassified = read_gallery(folder), _misclassified(record)
    assert len(shown.misclassified) == LIMIT
    assert all((e.attack, e.eps) == misclassified[e.image][1:3] for e in shown.misclassified)
    assert all((folder / e.file(p)).is_file() for e in (*shown.misclassified, *shown.robust) for p in e.pictures)
    named = {e.image for e in (*shown.misclassified, *shown.robust)}
    assert {int(path.name[:6]) for path in folder.glob("*.png")} == named


@pytest.mark.parametrize("where", ["checks.after_attacks", "evaluator.EvaluationRecord.save"])
def test_one_killed_after_its_attacks_keeps_all_its_pictures(
    evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    expected = read_gallery(evaluate(record_name="whole")[1].with_name("whole.gallery"))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"robustfpd.evaluation.{where}", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate()
    shown = read_gallery(evaluate()[1])
    assert [e.image for e in shown.misclassified] == [e.image for e in expected.misclassified]
    assert [e.image for e in shown.robust] == [e.image for e in expected.robust]
    assert shown.landscape is not None


def test_what_a_smallest_perturbation_turns_at_a_larger_radius_is_shown(evaluate: Evaluate) -> None:
    from robustfpd.evaluation.suites import _SUITES, Suite

    _SUITES["smallest"] = Suite(lambda target: [AttackSpec("FMN", "fmn", options={"steps": 20})], probes=0)
    try:
        record, folder = evaluate(suite="smallest", norm="l2", eps=(0.1, 0.5, 1.0), gallery=100)
    finally:
        del _SUITES["smallest"]
    misclassified, shown = _misclassified(record), read_gallery(folder)
    assert len({eps for _, _, eps, _ in misclassified.values()}) > 1
    assert {e.image: e.eps for e in shown.misclassified} == {
        image: eps for image, (_, _, eps, _) in misclassified.items()
    }
    assert all(e.distance <= e.eps * (1 + 1e-5) + 1e-5 for e in shown.misclassified)


def test_a_picture_that_cannot_be_made_costs_no_evaluation(evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("robustfpd.evaluation.gallery.loss_landscape", out_of_memory)
    record, folder = evaluate()
    shown = read_gallery(folder)
    assert shown.misclassified
    assert shown.landscape is None
    assert shown.problems == ("the loss landscape was not drawn: RuntimeError: out of memory",)
    assert record.worst_case


def test_what_cannot_be_restored_is_shown_without(
    digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, images, _ = digits
    fpd = rf.enhance("resnet_mini", num_classes=10, in_channels=1, image_size=8, pyramid_channels=8)
    fpd.train()(images)
    with torch.no_grad():  # the gallery shows images that are classified correctly without an attack
        labels = fpd.eval()(images).logits.argmax(dim=1)
    cut = torch.split

    def out_of_memory(tensor: Tensor, *rest: Any) -> Any:
        if tensor.ndim == 4:
            raise RuntimeError("out of memory")
        return cut(tensor, *rest)

    finish = Gallery.save

    def failing(self: Gallery, *, final: bool) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("robustfpd.evaluation.gallery.torch.split", out_of_memory)
            finish(self, final=final)

    monkeypatch.setattr(Gallery, "save", failing)
    install_suite(monkeypatch, AttackSpec("FGSM", "fgsm"))
    rf.evaluate(fpd, (images[:9], labels[:9]), suite="ours", eps=0.2, out_dir=tmp_path)
    shown = read_gallery(gallery_folder(tmp_path / "record.json"))
    assert shown.misclassified or shown.robust
    assert not any(e.has_restored for e in (*shown.misclassified, *shown.robust))
    assert shown.problems == ("nothing was restored: RuntimeError: out of memory",)


def test_candidates_do_not_hold_the_batches_that_they_were_in(
    digits: Digits, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    finish = Gallery.finish

    def watched(self: Gallery, view: nn.Module, survivors: Tensor) -> None:
        candidates = [*self._misclassified.values(), *self._survivors.values()]
        sizes.extend(t.untyped_storage().nbytes() for c in candidates for t in c.pixels)
        finish(self, view, survivors)

    monkeypatch.setattr(Gallery, "finish", watched)
    evaluate()
    assert len(sizes) > LIMIT
    assert set(sizes) == {digits[1][0].numel() * 4}


def test_another_evaluation_does_not_keep_the_pictures_of_the_one_before(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate()
    (tmp_path / "record.json").unlink()
    record, folder = evaluate(seed=1, eps=0.02)
    shown = read_gallery(folder)
    assert {e.eps for e in (*shown.misclassified, *shown.robust)} == {0.02}
    assert {int(path.name[:6]) for path in folder.glob("*.png")} == {
        e.image for e in (*shown.misclassified, *shown.robust)
    }
    assert shown.settings_sha256 == record.settings_sha256


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1, "norm": "linf"}'])
def test_a_damaged_gallery_is_an_input_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "gallery.json").write_text(text)
    with pytest.raises(InputError, match=r"gallery\.json"):
        read_gallery(tmp_path)


def test_what_is_listed_is_read_back(evaluated: tuple[EvaluationRecord, Path]) -> None:
    _, folder = evaluated
    shown = read_gallery(folder)
    assert GalleryIndex.model_validate_json(shown.model_dump_json()) == shown


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (5, "L")])
def test_pictures_of_any_number_of_channels(channels: int, mode: str) -> None:
    image = torch.linspace(-1, 2, channels * 20).reshape(channels, 4, 5)
    picture = to_picture(image)
    assert (picture.mode, picture.size) == (mode, (5, 4))
    first = torch.from_numpy(np.array(picture, dtype=np.float32)).reshape(4, 5, -1)[..., 0] / 255
    torch.testing.assert_close(first, image[0].clamp(0, 1), atol=1 / 500, rtol=0)


def test_class_names_join_the_record(evaluate: Evaluate) -> None:
    names = tuple("abcdefghij")
    record, _ = evaluate(class_names=names)
    assert record.class_names == names
    with pytest.raises(InputError, match="class_names must be 10, one for each logit, found 3"):
        evaluate(class_names=("a", "b", "c"), record_name="other")
