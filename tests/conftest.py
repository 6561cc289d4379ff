"""Fixtures that several folders share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def _threads() -> None:
    """One thread: the tensors are tiny, and threads wait for each other where other work runs beside the tests."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Modules that a test writes and imports are forgotten after it: the next one's has the same name."""
    before, places = set(sys.modules), list(sys.path)
    yield
    written = str(tmp_path_factory.getbasetemp())
    for name in sys.modules.keys() - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(written):
            del sys.modules[name]
    sys.path[:] = places


@pytest.fixture
def mnist_root() -> Path:
    """Folder with the real MNIST; the test is skipped where it is absent."""
    root = SHARED / "data"
    if not (root / "MNIST" / "raw").is_dir():
        pytest.skip("no MNIST beside the project")
    return root


@pytest.fixture(scope="session")
def models_script() -> ModuleType:
    """The script models/add.py, which is no part of the package."""
    path = Path(__file__).parents[1] / "models" / "add.py"
    spec = importlib.util.spec_from_file_location("models_add", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def add_model(models_script: ModuleType) -> Callable[..., None]:
    """`add` of models/add.py."""
    add: Callable[..., None] = models_script.add
    return add


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """Makes a run's folder as training leaves it, with weights that never learned, and an evaluation of 20 images."""
    from tests.fpds import as_trained

    from robustfpd import data, evaluation
    from robustfpd.config import RunConfig
    from robustfpd.io import write_json
    from robustfpd.models import FPD, build
    from robustfpd.provenance import environment

    def make(folder: Path, config: RunConfig, seed: int = 0) -> Path:
        splits = data.load(config.data)
        model = build(splits.info.task, config.model, seed=seed)
        if isinstance(model, FPD):
            as_trained(model)
        model.train()(splits.train.floats()[0][:32])  # running statistics, or the logits are all alike
        model.eval().save(folder / "checkpoints" / "best")
        config.save(folder / "config.yaml")
        (folder / "metrics.csv").write_text("epoch,seconds\n0,61.25\n1,60.0\n")
        test = {"images": len(splits.test), "sha256": splits.test.digest()}
        write_json(folder / "environment.json", {**environment(), "data": {"test": test}, "start": str(folder)})
        images, labels = splits.test.floats()
        record = evaluation.evaluate(
            model.classifier(), (images, labels), suite="first-look", eps=(0.05, 8 / 255), num_images=20,
            model_name=str(folder),
        )  # fmt: skip
        record.save(folder / "evaluation" / "first.json")
        return folder

    return make


@pytest.fixture(scope="session")
def fpd_run(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small FPD's run on digits, its data in a folder of this machine; tests that change it copy it first."""
    from robustfpd.config import recipe

    small = ["model.pyramid_channels=4", "model.head=tanh", "training.epochs=2", "adversarial.epochs=2"]
    config = recipe("digits/mini", [*small, "data.root=/machine/of/mine"])
    return make_run(tmp_path_factory.mktemp("fpd") / "digits-mini", config)


@pytest.fixture(scope="session")
def baseline_run(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undefended baseline's run on digits; tests that change it copy it first."""
    from robustfpd.config import recipe

    return make_run(tmp_path_factory.mktemp("baseline") / "digits-mini", recipe("digits/mini").baseline())


@pytest.fixture(scope="session")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network that has learned 8×8 digits, and 100 images that it did not see."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(classes).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
        for step in range(400):
            batch = torch.arange(100, 164) + 64 * (step % 25)
            loss = nn.functional.cross_entropy(net(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    net.zero_grad(set_to_none=True)
    return net.eval(), images[:100], labels[:100]
