from __future__ import annotations

import pytest
import torch

from robustfpd.device import check_device_name, device_name, resolve_device, resolve_precision
from robustfpd.errors import InputError


@pytest.mark.parametrize(("amx", "avx"), [(True, True), (True, False), (False, True), (False, False)])
def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch, amx: bool, avx: bool) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx)
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == ("bf16" if amx or avx else "fp32")
    assert (resolve_precision("fp32", cpu), resolve_precision("bf16", cpu)) == ("fp32", "bf16")


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_is_bf16_on_gpus_that_have_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert resolve_precision("auto", torch.device("cuda", 0)) == expected
    assert resolve_precision("auto", torch.device("mps")) == "fp32"


def test_other_precisions_are_refused() -> None:
    with pytest.raises(InputError, match="fp32"):
        resolve_precision("fp31", torch.device("cpu"))  # type: ignore[arg-type]


def test_auto_takes_cuda_then_mps_then_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    available = {"cuda": True, "mps": True}
    monkeypatch.setattr("torch.cuda.is_available", lambda: available["cuda"])
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: available["mps"])
    assert device_name() == device_name(world_size=2) == "cuda"
    available["cuda"] = False
    assert (device_name(), device_name(world_size=2)) == ("mps", "cpu")
    available["mps"] = False
    assert device_name() == "cpu"
    assert resolve_device() == torch.device("cpu")


@pytest.mark.parametrize(("name", "message"), [
    ("cdua", "unknown device 'cdua'; did you mean 'cuda'"), ("cuda:x", "an index as in cuda:1; found 'cuda:x'"),
])  # fmt: skip
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_device_name(name)
    with pytest.raises(InputError, match=message):
        resolve_device(name)


@pytest.mark.parametrize("name", ["mps", "cuda:0"])
def test_several_ranks_take_cpu_or_a_gpu_each(name: str) -> None:
    assert device_name("cuda", world_size=2) == "cuda"
    with pytest.raises(InputError, match=f"2 processes run on cpu, or on a GPU each with cuda, found device '{name}'"):
        device_name(name, world_size=2)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="device 'cuda:99' cannot be used here"):
        resolve_device("cuda:99")
