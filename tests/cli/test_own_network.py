"""A newcomer with a folder of photographs and a network of his own."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robustfpd.cli import main
from robustfpd.config import load_run
from robustfpd.evaluation import EvaluationRecord

NETWORK = """
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.maxpool = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.MaxPool2d(2)
        for i in range(1, 5):
            convolution = nn.Conv2d(8, 8, 3, stride=1 + (i > 2), padding=1, bias=False)
            setattr(self, f"layer{i}", nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU()))

    def forward(self, x):
        return self.layer4(self.layer3(self.layer2(self.layer1(self.maxpool(self.conv1(x))))))
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "smallnets", raising=False)
    monkeypatch.setenv("ROBUSTFPD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "smallnets.py").write_text(NETWORK)
    draws = np.random.default_rng(0)
    for number, name in enumerate(("cats", "dogs", "birds")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = draws.integers(80 * number, 80 * number + 60, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")


SETTINGS = ("model.backbone=smallnets:Small", "data.image_size=16", "data.stored_size=18", "training.batch_size=8",
            "training.epochs=1", "model.pyramid_channels=4")  # fmt: skip


@pytest.mark.parametrize("plain", [False, True])
def test_from_photographs_and_a_network_to_an_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: bool
) -> None:
    train = ["train", "folder/mini", "--data-root", "photos", *SETTINGS, *(["--baseline"] if plain else [])]
    main([*train, "--dry-run"])
    assert not (tmp_path / "cache").exists()  # the plan decodes nothing
    assert "3 classes of 3×16×16 images" in capsys.readouterr().out
    main(train)
    run = Path("runs/folder-mini-baseline" if plain else "runs/folder-mini")
    assert f"next: robustfpd evaluate {run} --trust-code\n" in capsys.readouterr().out
    assert load_run(run / "config.yaml").data.root == "photos"
    words = ["evaluate", str(run), "--suite", "first-look", "--num-images", "3", "--json"]
    main([*words, "--trust-code"])  # knows where the images are
    found = json.loads(capsys.readouterr().out)
    assert found["num_images"] == 3
    assert set(EvaluationRecord.load(Path(found["path"])).surrogates) == set()
    with pytest.raises(SystemExit):  # a dry run attacks a few images, and finds that these are no logits
        main(["evaluate", "--model", "smallnets:Small", "--dataset", "folder", "--data-root", "photos", "--dry-run"])
    assert "classifier must return logits N×K" in capsys.readouterr()[1]


def test_what_is_not_there_any_more_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["train", "folder/mini", "--data-root", "photos", *SETTINGS, "--quiet"])
    assert capsys.readouterr().out == ""
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    for moved, said in ((False, "no folder .*photos; give the one"), (True, "smallnets cannot be imported from here")):
        if moved:
            (tmp_path / "smallnets.py").unlink()
            monkeypatch.delitem(sys.modules, "smallnets")
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", "runs/folder-mini", "--trust-code", *(["--data-root", "elsewhere"] if moved else [])])
        assert ended.value.code == 2
        error = capsys.readouterr()[1]
        assert re.search(said, error), error


def test_a_run_brings_no_code_unless_it_is_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = ["--stages", "two-phase,adversarial", "adversarial.epochs=1"]
    main(["train", "folder/mini", "--data-root", "photos", *SETTINGS, *stages, "--quiet"])
    main(["train", "folder/mini", "--data-root", "photos", *SETTINGS, *stages, "--quiet", "--resume"])  # typed again
    monkeypatch.delitem(sys.modules, "smallnets")
    (tmp_path / "smallnets.py").write_text("open('ran', 'w')\n" + NETWORK)
    picture, run = "photos/cats/0.png", "runs/folder-mini"
    first_look = ["--suite", "first-look", "--num-images", "3"]
    commands = (
        ["predict", run, picture], ["doctor", run], ["export", run, "--format", "torch"],
        ["evaluate", run, *first_look],
        ["evaluate", "digits/mini-fpd", *first_look, "--surrogate", run],
    )  # fmt: skip
    for words in commands:
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert "is made by smallnets:Small; loading executes that code" in capsys.readouterr()[1]
    assert not (tmp_path / "ran").exists()
    for words in commands[:3]:
        with contextlib.suppress(SystemExit):  # the doctor finds much in a network that was trained for an epoch
            main([*words, "--trust-code"])
        assert "is made by" not in capsys.readouterr()[1]
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()
        monkeypatch.delitem(sys.modules, "smallnets")


def test_a_resumed_run_does_not_bring_code_that_its_settings_do_not_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "folder/mini", "--data-root", "photos", *SETTINGS, "--quiet"]
    main(train)
    settings = tmp_path / "runs" / "folder-mini" / "checkpoints" / "best" / "config.json"
    settings.write_text(settings.read_text().replace("smallnets:Small", "evilnets:make"))
    (tmp_path / "evilnets.py").write_text("open('ran', 'w')")
    with pytest.raises(SystemExit):
        main([*train, "--resume"])
    assert "is made by evilnets:make" in capsys.readouterr()[1]
    with pytest.raises(SystemExit):
        main([*train, "--stages", "adversarial"])
    assert "backbone was 'evilnets:make', now 'smallnets:Small'" in capsys.readouterr()[1]
    assert not (tmp_path / "ran").exists()
