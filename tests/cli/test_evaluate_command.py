from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from robustfpd.cli import main
from robustfpd.evaluation import EvaluationRecord
from robustfpd.evaluation.ledger import Ledger, LedgerRow
from robustfpd.models.import_model import import_model
from robustfpd.report.metrics import answers_text
from robustfpd.report.paths import resolve_network

MODULE = """
import torch
from torch import nn

def _net(outputs=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs)).eval()

def make():
    return _net()

def seven():
    return _net(7)

class _Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = _net()
    def forward(self, images):
        return 1e4 * self.net(images)

def scaled():
    return _Scaled().eval()

def raises():
    raise RuntimeError("no weights here")

class _Large(nn.Module):
    def forward(self, images):
        return images.reshape(len(images), 1, 99)

large = _Large().eval()
number = 3
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's in the folder one is in."""
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mynets", raising=False)
    (tmp_path / "mynets.py").write_text(MODULE)


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr()[1]


FAST = ("--dataset", "digits", "--eps", "0.05", "--num-images", "40", "--suite", "first-look")


def test_any_module_can_be_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "--model", "mynets:make", *FAST])
    out = capsys.readouterr().out
    assert "mynets:make: 40 images, linf, suite first-look" in out
    assert "Is the model robust? not robust" in out
    assert "Is the measurement reliable? trusted" in out
    assert "backward passes per image, checks included" in out
    record = EvaluationRecord.load(Path("runs/mynets-make-evaluation/digits-first-look-linf.json"))
    assert record.num_images == 40
    assert {row.attack for row in record.ledger} == {"clean", "FGSM", "PGD-40"}


def test_a_radius_of_0_is_the_clean_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "--model", "mynets:make", *FAST, "--eps", "0", "0.05"]
    main([*arguments, "--dry-run"])
    assert "eps 0 0.05" in capsys.readouterr().out
    main(arguments)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "% [" in line and ":" not in line]
    assert [row[0] for row in rows] == ["0", "0.05"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a network"),
        (("runs/x", "--model", "mynets:make"), "name one network: runs/x, or --model mynets:make"),
        (
            ("mnist/mini-fpd", "--surrogate", "mynets:make", "--space", "normalised"),
            "--surrogate networks take pixels",
        ),
        (("--model", "mynets"), "--model must be package.module:factory, found 'mynets'"),
        (("--model", "nonets:make"), "nonets cannot be imported from here: ModuleNotFoundError"),
        (("--model", "mynets:mak", *FAST), "unknown name in mynets 'mak'; did you mean 'make'"),
        (("--model", "mynets:number", *FAST), "must be a torch.nn.Module or a function that returns one, found int"),
        (("--model", "mynets:raises", *FAST), r"mynets:raises\(\) raised RuntimeError: no weights here"),
        (("--model", "builtins:dict", *FAST), r"builtins:dict\(\) must return a torch.nn.Module, found dict"),
        (("--model", "mynets:make"), "mynets:make is no run; name its test images with --dataset"),
        (("--model", "mynets:seven", *FAST), "mynets:seven gives 7 logits, digits has 10 classes"),
        (("--model", "mynets:large", *FAST), "mynets:large raised RuntimeError on an image .*--image-size"),
        (("--model", "mynets:make", *FAST, "--image-size", "0"), "--image-size must be at least 1, found 0"),
        (("--model", "mynets:make", *FAST, "--surrogate", "mynets:none"), "unknown name in mynets 'none'"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_an_error(
    capsys: pytest.CaptureFixture[str], arguments: Sequence[str], message: str
) -> None:
    import re

    assert re.search(message, _fails(capsys, *arguments))
    assert not Path("runs").exists()


def test_strict_ends_with_3_unless_the_number_can_be_trusted(capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "--model", "mynets:make", *FAST, "--strict"])
    assert "The measurement is reliable." in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--model", "mynets:scaled", *FAST, "--strict"])
    assert ended.value.code == 3
    out = capsys.readouterr().out
    assert "Is the measurement reliable? suspect" in out
    assert "vanishing-gradients: zero gradients" in out
    main(["evaluate", "--model", "mynets:scaled", *FAST])
    assert "measurement is not reliable" in capsys.readouterr().out


def test_surrogates_are_attacked_under_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*FAST[:-1], "quick"]
    main(["evaluate", "--model", "mynets:make", *words, "--surrogate", "mynets:scaled"])
    record = EvaluationRecord.load(Path("runs/mynets-make-evaluation/digits-quick-linf.json"))
    assert record.surrogates == ("mynets:scaled",)
    assert [a.attack for a in record.attacks if "transfer" in a.attack] == ["PGD-40, transfer from mynets:scaled"]


def test_the_baseline_of_a_zoo_network_is_a_surrogate_by_default() -> None:
    assert resolve_network("mnist/mini-fpd").baseline == "mnist/mini-baseline"
    assert resolve_network("mnist/mini-baseline").baseline is None
    assert resolve_network("digits/mini-fpd").baseline is None


def test_a_module_is_taken_as_it_is() -> None:
    assert isinstance(import_model("mynets:large"), nn.Module)
    assert import_model("mynets:large") is import_model("mynets:large")
    assert torch.equal(
        import_model("mynets:make").state_dict()["1.weight"], import_model("mynets:make").state_dict()["1.weight"]
    )


def test_an_interrupted_evaluation_is_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ["evaluate", "--model", "mynets:make", *FAST]
    folder = Path("runs/mynets-make-evaluation")
    add, calls = Ledger.add, [0]

    def interrupted(self: Ledger, rows: Sequence[LedgerRow]) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        add(self, rows)

    monkeypatch.setattr(Ledger, "add", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(whole)
    assert ended.value.code == 130
    assert "are kept in runs/mynets-make-evaluation" in capsys.readouterr().out
    assert not EvaluationRecord.load(folder / "digits-first-look-linf.json").complete
    kept = (folder / "digits-first-look-linf.ledger.csv").read_text()
    monkeypatch.setattr(Ledger, "add", add)
    main(whole)
    assert "resumed the unfinished evaluation" in capsys.readouterr().out
    assert (folder / "digits-first-look-linf.ledger.csv").read_text().startswith(kept)
    assert sorted(p.name for p in folder.iterdir()) == [
        "digits-first-look-linf.gallery",
        "digits-first-look-linf.json",
        "digits-first-look-linf.ledger.csv",
    ]
    before = (folder / "digits-first-look-linf.json").read_bytes()
    main(whole)
    assert "evaluated before" in capsys.readouterr().out
    assert (folder / "digits-first-look-linf.json").read_bytes() == before


def test_both_answers_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "--model", "mynets:scaled", *FAST])
    out = capsys.readouterr().out
    record = EvaluationRecord.load(Path("runs/mynets-scaled-evaluation/digits-first-look-linf.json"))
    headline, _, *lines = str(answers_text(record)).splitlines()
    assert headline == record.headline
    assert lines[:4] == [
        "Is the model robust? not robust",
        f"  robust accuracy: {record.worst_case[0].robust}",
        f"  clean accuracy: {record.clean}",
        f"  guessing: {100 * (record.guessing or 0):.1f} %",
    ]
    assert lines[4].endswith("backward passes per image, checks included")
    assert lines[5].startswith("Is the measurement reliable? suspect (")
    suspicious = [check for check in record.verdict.checks if check.outcome == "suspicious"]
    assert lines[6::2] == [f"  {reason}" for reason in record.verdict.reasons]
    assert lines[7::2] == [f"    → {check.fix}" for check in suspicious]
    assert all(line in out.splitlines() for line in (headline, *lines))
    values = json.loads(Path("runs/mynets-scaled-evaluation/digits-first-look-linf.json").read_text())
    assert values["verdict"]["status"] == "suspect"


def test_json_has_both_answers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "--model", "mynets:make", *FAST, "--json"])
    found = json.loads(capsys.readouterr().out)
    record = EvaluationRecord.load(Path(found["path"]))
    assert (record.dataset, found["headline"]) == ("digits", record.headline)
    assert found["robustness"] == record.robustness.model_dump(mode="json")
    assert found["robustness"]["level"] == "not robust"
    assert found["verdict"]["status"] == "trusted"


def test_a_certified_accuracy_that_attacks_contradict_breaks_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "--model", "mynets:make", *FAST])
    assert "certified" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--model", "mynets:make", *FAST, "--certified-accuracy", "0.65", "--strict"])
    assert ended.value.code == 3
    out = " ".join(capsys.readouterr().out.split())
    assert "is below the certified accuracy, 65.0 %" in out
    assert "Is the measurement reliable? broken" in out
    assert "65 % is 0.65" in _fails(capsys, "--model", "mynets:make", *FAST, "--certified-accuracy", "65")


def test_only_test_images_in_pixels_have_a_published_number(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(run), "--split", "validation", "--num-images", "8", "--suite", "first-look", "--json"])
    assert EvaluationRecord.load(Path(json.loads(capsys.readouterr().out)["path"])).dataset == ""
