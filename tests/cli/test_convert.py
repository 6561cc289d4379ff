from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fpds import corrected
from torch import Tensor

import robustfpd as rf
from robustfpd.cli import main
from robustfpd.config import TaskConfig
from robustfpd.models.factory import assemble

RENAMED = {"decoder.laterals.0": "latlayer3", "decoder.laterals.1": "latlayer2", "decoder.laterals.2": "latlayer1",
           "decoder.laterals.3": "toplayer", "decoder.smooth": "smooth3", "decoder.upscale": "trans_conv",
           "head.linear": "fc", "backbone.net.": "", ".residual.": ".split_transforms."}  # fmt: skip


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A ResNeXt as the authors save theirs, every number 0.01."""
    config = corrected(backbone="published_resnext_1_1_1_1", pyramid_channels=64, unstrided_kernel=2)
    with torch.device("meta"):
        model = assemble(TaskConfig(num_classes=10, image_size=(64, 64)), config)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in RENAMED.items():
            name = name.replace(ours, theirs)
        if name not in ("mean", "std"):
            state[name] = torch.full((), 0.01).to(tensor.dtype).expand(tensor.shape)
    path = tmp_path / "bestmodel_params.pkl"
    torch.save({"state_dict": state, "opt_state_dict": {}, "opt_state_dict2": {}, "epoch": 57}, path)
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["convert", *map(str, arguments)])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed[1].strip().splitlines()) == 1
    return printed[1]


def test_a_checkpoint_becomes_a_model(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my model"
    main(["convert", str(published), str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{published}: ResNeXt-14 32×4d (1, 1, 1, 1 blocks), with a Feature Pyramid Decoder, 64 channels wide",
        "  10 classes of 3×64×64 images, 6.3 million parameters, epoch 57",
        f"wrote {folder}",
        f"next: robustfpd evaluate '{folder}' --dataset DATASET, with the images it was trained for",
    ]
    model = rf.load(folder)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(6.3e6, abs=5e4)
    assert isinstance(model, rf.FPD)
    assert all(torch.equal(p, torch.full_like(p, 0.01)) for p in model.parameters())
    assert (
        refusal(capsys, published, folder) == f"error: {folder} holds files; give a new or empty folder for the model\n"
    )


def test_the_image_size_is_written_down(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", str(published), str(tmp_path / "model"), "--image-size", "32"])
    assert "3×32×32 images" in capsys.readouterr().out
    assert rf.load(tmp_path / "model").task.image_size == (32, 32)
    assert "image_size must be at least 8" in refusal(capsys, published, tmp_path / "other", "--image-size", "4")
    assert not (tmp_path / "other").exists()


def test_what_is_refused_leaves_nothing_behind(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published.write_bytes(published.read_bytes()[:-200])
    assert "is damaged" in refusal(capsys, published, tmp_path / "model")
    assert "no file" in refusal(capsys, tmp_path / "nowhere.pkl", tmp_path / "model")
    assert not (tmp_path / "model").exists()
