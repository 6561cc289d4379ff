from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustfpd.errors import InputError
from robustfpd.evaluation import EvaluationRecord, LedgerRow, OtherEvaluation, evaluate, suites
from robustfpd.evaluation.ledger import Ledger, read_rows, write_rows
from robustfpd.evaluation.suites import AttackSpec, Suite, SuiteContext

if TYPE_CHECKING:
    from tests.evaluation.conftest import Data

SETTINGS: dict[str, Any] = {"gallery": 0, "suite": "small", "eps": (0.01, 0.04), "seed": 3, "batch_size": 9}


def _small(target: SuiteContext) -> list[AttackSpec]:
    """A few attacks of every kind: with and without gradients, random starts, early stopping, minimal norm."""
    return [
        AttackSpec("FGSM", "fgsm"),
        AttackSpec("PGD", "pgd", options={"steps": 3, "early_stop": True}),
        AttackSpec("FMN", "fmn", options={"steps": 12}),
        AttackSpec("DeepFool", "deepfool"),
        *(AttackSpec(f"from {name}", "pgd", name, {"steps": 2}) for name in target.surrogates),
        AttackSpec("Square", "square", options={"queries": 6}, share=1 / 8),
    ]


@pytest.fixture(autouse=True)
def _suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(suites._SUITES, "small", Suite(_small, probes=0))


class Net(nn.Module):
    """A small network that is interrupted at its forward pass number `left`."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(0.5 * torch.randn(36, 12, generator=draws))
        self.second = nn.Parameter(0.8 * torch.randn(12, 3, generator=draws))
        self.calls, self.left = 0, -1
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.left:
            raise KeyboardInterrupt
        out: Tensor = torch.tanh((images.flatten(1) - 0.5) @ self.first) @ self.second
        return out


@pytest.fixture(scope="module")
def images() -> Data:
    draws = torch.Generator().manual_seed(5)
    x = torch.rand(30, 1, 6, 6, generator=draws)
    labels = Net()(x).argmax(1)
    labels[::7] = (labels[::7] + 1) % 3
    return x, labels


def _timeless(record: EvaluationRecord) -> dict[str, Any]:
    """All of a record but what the clock and the machine say."""
    seconds = {"__all__": {"seconds"}}
    return record.model_dump(exclude={"environment": True, "attacks": seconds, "ledger": seconds})


def test_the_suite_here_does_what_it_is_for(images: Data) -> None:
    record = evaluate(Net(), images, surrogates={"other": Net(1)}, **SETTINGS)
    outcomes = {(r.attack, r.outcome) for r in record.ledger}
    assert {
        ("clean", "misclassified"),
        ("FGSM", "misclassified"),
        ("FMN", "robust"),
        ("from other", "robust"),
    } <= outcomes
    assert record.clean.count > record.worst_case[0].robust.count > record.worst_case[1].robust.count > 0


@pytest.mark.parametrize("every_attack", [False, True])
def test_an_evaluation_killed_anywhere_ends_with_the_same_record(
    images: Data, tmp_path: Path, every_attack: bool
) -> None:
    options = {**SETTINGS, "every_attack": every_attack, "surrogates": {"other": Net(1)}}
    whole = Net()
    expected = _timeless(evaluate(whole, images, **options))
    for kill_at in range(1, whole.calls + 1, 61 if every_attack else 43):
        net, folder = Net(), tmp_path / str(kill_at)
        net.left = kill_at
        with pytest.raises(KeyboardInterrupt):
            evaluate(net, images, out_dir=folder, **options)
        partial = folder / "record.json"
        assert not partial.exists() or not EvaluationRecord.load(partial).complete
        ledger = folder / "record.ledger.csv"
        before = len(read_rows(ledger)) if ledger.is_file() else 0
        net.left, net.calls = -1, 0
        record = evaluate(net, images, out_dir=folder, **options)
        assert _timeless(record) == expected
        assert _timeless(EvaluationRecord.load(folder / "record.json")) == expected
        assert before == 0 or net.calls < whole.calls
        assert sorted(p.name for p in folder.iterdir()) == ["record.json", "record.ledger.csv"]


def test_one_that_is_killed_again_and_again_gets_on_each_time(images: Data, tmp_path: Path) -> None:
    expected = _timeless(evaluate(Net(), images, **SETTINGS))
    rows, net = [], Net()
    for _ in range(60):
        net.calls, net.left = 0, 45
        try:
            record = evaluate(net, images, out_dir=tmp_path, **SETTINGS)
            break
        except KeyboardInterrupt:
            rows.append(len(read_rows(tmp_path / "record.ledger.csv")))
    assert len(rows) > 2
    assert rows == sorted(rows)  # equal where checks were made in between
    assert _timeless(record) == expected


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, images: Data) -> tuple[bytes, bytes, dict[str, Any]]:
    """The files of an evaluation that was killed before its last attack, and the record of one that was not."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suites._SUITES, "small", Suite(_small, probes=0))
        whole, net = Net(), Net()
        expected = _timeless(evaluate(whole, images, **SETTINGS))
        net.left = whole.calls - 4
        with pytest.raises(KeyboardInterrupt):
            evaluate(net, images, out_dir=folder, **SETTINGS)
    ledger, marker = folder / "record.ledger.csv", folder / "record.unfinished.json"
    return ledger.read_bytes(), marker.read_bytes(), expected


def _resume(folder: Path, images: Data, ledger: bytes, marker: bytes) -> dict[str, Any]:
    folder.mkdir()
    (folder / "record.ledger.csv").write_bytes(ledger)
    (folder / "record.unfinished.json").write_bytes(marker)
    return _timeless(evaluate(Net(), images, out_dir=folder, **SETTINGS))


def test_a_ledger_cut_off_anywhere_is_gone_on_with(
    killed: tuple[bytes, bytes, dict[str, Any]], images: Data, tmp_path: Path
) -> None:
    ledger, marker, expected = killed
    places = random.Random(0).sample(range(len(ledger)), 12)
    last_line = ledger[:-1].rfind(b"\n")
    for place in [0, 5, last_line, last_line + 1, last_line + 2, len(ledger) - 1, len(ledger), *places]:
        assert _resume(tmp_path / f"{place}", images, ledger[:place], marker) == expected


def test_a_ledger_cut_off_inside_a_character_is_gone_on_with(tmp_path: Path) -> None:
    path, rows = tmp_path / "r.ledger.csv", [_row(i, note="classifier must return logits N×K") for i in range(3)]
    first = Ledger()
    first.open(path, {"seed": 1})
    first.add(rows)
    content = path.read_bytes()
    path.write_bytes(content[: content.rfind("×".encode()) + 1])
    again = Ledger()
    again.open(path, {"seed": 1})
    assert again.replay("FGSM", 0.1, [0, 1]) == rows[:2]
    assert again.replay("FGSM", 0.1, [2]) is None
    assert read_rows(path) == rows[:2]


def test_a_ledger_that_is_missing_or_of_other_attacks_is_begun_anew_from_there(
    killed: tuple[bytes, bytes, dict[str, Any]], images: Data, tmp_path: Path
) -> None:
    ledger, marker, expected = killed
    lines = ledger.splitlines(keepends=True)
    for at in (1, 35, len(lines) - 1):
        assert _resume(tmp_path / f"without {at}", images, b"".join(lines[:at] + lines[at + 1 :]), marker) == expected
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "record.unfinished.json").write_bytes(marker)
    assert _timeless(evaluate(Net(), images, out_dir=tmp_path / "none", **SETTINGS)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 4}, "seed=3, this one has 4"),
        ({"eps": 0.1}, r"eps=\['0.01', '0.04'\], this one has \['0.1'\]"),
        ({"batch_size": 10}, "batch_size=9, this one has 10"),
        ({"every_attack": True}, "every_attack=False, this one has True"),
        ({"suite": "first-look"}, "suite='small', this one has 'first-look'"),
        ({"surrogates": {"other": Net(1)}}, "surrogates"),
        ({"num_images": 12}, "images"),
        ({"norm": "l2"}, "norm='linf', this one has 'l2'"),
        ({"classifier": Net(2)}, "weights="),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_another_evaluation_in_the_folder_is_refused_by_what_differs(
    killed: tuple[bytes, bytes, dict[str, Any]], images: Data, tmp_path: Path, change: dict[str, Any], message: str,
    finished: bool,
) -> None:  # fmt: skip
    if finished:
        _resume(tmp_path / "a", images, *killed[:2])
    else:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "record.ledger.csv").write_bytes(killed[0])
        (tmp_path / "a" / "record.unfinished.json").write_bytes(killed[1])
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    options = {**SETTINGS, "data": images, "out_dir": tmp_path / "a", "classifier": Net(), **change}
    with pytest.raises(OtherEvaluation, match=message):
        evaluate(**options)
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert issubclass(OtherEvaluation, InputError)


def test_an_evaluation_without_rows_is_replaced(images: Data, tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images, images

    with pytest.raises(InputError, match="must return logits"):
        evaluate(Pair(), images, out_dir=tmp_path, **SETTINGS)
    record = evaluate(Net(), images, out_dir=tmp_path, **SETTINGS)
    assert _timeless(record) == _timeless(evaluate(Net(), images, **SETTINGS))


class Scaled(Net):
    """The same weights, another answer."""

    scale = 1.0

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * super().forward(images)


def test_classifiers_with_equal_weights_but_other_code_are_different(images: Data, tmp_path: Path) -> None:
    net = Scaled()
    record = evaluate(net, images, out_dir=tmp_path, **SETTINGS)
    net.scale = -1.0
    with pytest.raises(OtherEvaluation, match="holds another evaluation"):
        evaluate(net, images, out_dir=tmp_path, **SETTINGS)
    net.scale = 1.0
    assert evaluate(net, images, out_dir=tmp_path, **SETTINGS) == record


def test_one_that_is_done_is_read_after_a_first_look_at_the_classifier(images: Data, tmp_path: Path) -> None:
    net = Net()
    record = evaluate(net, images, out_dir=tmp_path, **SETTINGS)
    net.calls, net.left = 0, 2
    assert evaluate(net, images, out_dir=tmp_path, **SETTINGS) == record
    assert net.calls == 1
    other = evaluate(Net(2), images, out_dir=tmp_path, record_name="other", **SETTINGS)
    assert other.weights_sha256 != record.weights_sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "other.json", "other.ledger.csv", "record.json", "record.ledger.csv",
    ]  # fmt: skip


@pytest.mark.parametrize("writes", [0, 1, 2, 9, 15])
@pytest.mark.parametrize("partial", [0, 1, 40])
def test_a_full_disk_loses_nothing_that_was_written(
    monkeypatch: pytest.MonkeyPatch, images: Data, tmp_path: Path, writes: int, partial: int
) -> None:
    path, done = tmp_path / "record.ledger.csv", 0
    kept: list[int] = []
    real = os.fsync

    def full(descriptor: int) -> None:
        nonlocal done
        if done == writes:
            size = path.stat().st_size
            os.truncate(path, max(size - partial, kept[-1] if kept else 0))
            raise OSError(errno.ENOSPC, "No space left on device")
        done += 1
        real(descriptor)
        kept.append(path.stat().st_size)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"ledger.csv cannot be written: \[Errno 28\] No space left.*free some space"):
        evaluate(Net(), images, out_dir=tmp_path, **SETTINGS)
    monkeypatch.undo()
    assert done == writes
    assert path.stat().st_size >= (kept[-1] if kept else 0)
    net = Net()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(suites._SUITES, "small", Suite(_small, probes=0))
        record = evaluate(net, images, out_dir=tmp_path, **SETTINGS)
        assert _timeless(record) == _timeless(evaluate(Net(), images, **SETTINGS))


def test_a_disk_that_is_full_at_the_start_or_at_the_end_is_an_input_error(
    monkeypatch: pytest.MonkeyPatch, images: Data, tmp_path: Path
) -> None:
    real = Path.write_bytes
    broken = ".record.ledger.csv.partial"

    def full(self: Path, *args: Any, **kwargs: Any) -> int:
        if self.name == broken:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_bytes", full)
    net = Net()
    with pytest.raises(InputError, match="cannot be written"):
        evaluate(net, images, out_dir=tmp_path, **SETTINGS)
    assert net.calls == 1  # the first look
    broken = ".record.json.partial"
    with pytest.raises(InputError, match=r"record.json cannot be written: \[Errno 28\] No space left"):
        evaluate(net, images, out_dir=tmp_path, **SETTINGS)
    broken = ""
    calls, net.calls = net.calls, 0
    record = evaluate(net, images, out_dir=tmp_path, **SETTINGS)
    assert net.calls < calls  # the checks' own alone
    assert _timeless(record) == _timeless(evaluate(Net(), images, **SETTINGS))


def test_a_folder_that_cannot_be_one_is_refused(images: Data, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        evaluate(Net(), images, out_dir=tmp_path / "file", **SETTINGS)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff"])
def test_a_damaged_marker_is_refused_and_nothing_is_deleted(images: Data, tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "record.unfinished.json").write_bytes(damage)
    (tmp_path / "record.ledger.csv").write_bytes(b"mine\n")
    with pytest.raises(InputError, match=r"record.unfinished.json is damaged; delete it and .*record.ledger.csv"):
        evaluate(Net(), images, out_dir=tmp_path, **SETTINGS)
    assert (tmp_path / "record.ledger.csv").read_bytes() == b"mine\n"


@pytest.mark.parametrize("every_attack", [False, True])
def test_smallest_perturbations_are_looked_for_once(images: Data, every_attack: bool) -> None:
    record = evaluate(Net(), images, every_attack=every_attack, **SETTINGS)
    alone = evaluate(Net(), images, every_attack=every_attack, **{**SETTINGS, "eps": 0.04})
    for label in ("FMN", "DeepFool"):
        first, second = ([r for r in record.ledger if (r.attack, r.eps) == (label, e)] for e in (0.01, 0.04))
        assert len(first) >= len(second) > 0
        assert all(r.queries > 0 for r in first)
        assert all(r.queries == r.gradients == r.seconds == 0 for r in second)
        found = {r.image: r for r in first}
        for row in second:
            assert row.distance == found[row.image].distance
            misclassified = row.adversarial_prediction != row.label and row.distance <= 0.04
            assert row.outcome == ("misclassified" if misclassified else "robust")
        result = next(a for a in record.attacks if (a.attack, a.eps) == (label, 0.04))
        assert (result.forward_passes, result.backward_passes) == (0, 0)
    assert record.worst_case[1].robust.count == alone.worst_case[0].robust.count
    if every_attack:
        assert [r.image for r in record.ledger if (r.attack, r.eps) == ("FMN", 0.04)] == [
            r.image for r in record.ledger if (r.attack, r.eps) == ("FMN", 0.01)
        ]


def _row(image: int, **changes: Any) -> LedgerRow:
    values = {
        "image": image, "label": 1, "clean_prediction": 1, "attack": "FGSM", "eps": 0.1, "adversarial_prediction": 0,
        "distance": 0.1, "outcome": "misclassified", "margin": 0.0,
    }  # fmt: skip
    return LedgerRow.model_validate({**values, **changes})


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    image=st.integers(0, 10**9),
    eps=st.floats(0, 1),
    distance=st.floats(0, 1e6),
    margin=st.floats(-1e9, 1e9),
    note=st.text(st.characters(exclude_categories=["Cs", "Cc"])),
    label=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
)
def test_rows_survive_the_file_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, image: int, eps: float, distance: float, margin: float, note: str,
    label: str,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("rows") / "r.ledger.csv"
    row = _row(image, eps=eps, distance=distance, margin=margin, note=note, attack=label, outcome="failed")
    write_rows(path, [row, row])
    assert read_rows(path) == read_rows(path, cut_off=True) == [row, row]


def test_replay_gives_batches_in_their_order_and_drops_what_does_not_follow(tmp_path: Path) -> None:
    path = tmp_path / "r.ledger.csv"
    first = Ledger()
    first.open(path, {"seed": 1})
    assert first.replay("FGSM", 0.1, [0, 1]) is None
    first.add([_row(0), _row(1)])
    first.add([_row(2)])
    again = Ledger()
    again.open(path, {"seed": 1})
    assert again.replay("FGSM", 0.1, [0, 1]) == [_row(0), _row(1)]
    assert again.replay("FGSM", 0.2, [2]) is None
    assert again.rows == read_rows(path) == [_row(0), _row(1)]
    assert again.replay("FGSM", 0.1, [2]) is None
    marker = tmp_path / "r.unfinished.json"
    assert json.loads(marker.read_text()) == {"seed": 1}
    again.finish()
    assert not marker.exists()
