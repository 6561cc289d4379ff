from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import study
from benchmarks.study import ABLATED, ABLATION, PROCEDURES, SETTINGS, VARIANTS, Network, plan, settings
from robustfpd.evaluation import EvaluationRecord, Proportion, Verdict, WorstCase


def test_the_plan_names_every_network_once_and_the_first_seeds_first() -> None:
    networks = plan()
    names = [network.name for network in networks]
    assert len(set(names)) == len(names)
    for dataset in SETTINGS:
        for procedure in PROCEDURES:
            for variant in VARIANTS:
                assert f"{dataset}-{procedure}-{variant.name}-0" in names
    for procedure in ABLATED:
        for change in ABLATION[procedure]:
            assert f"digits-{procedure}-{change}-0" in names
    seeds = [network.seed for network in networks]
    assert seeds == sorted(seeds)


@pytest.mark.parametrize("network", plan(), ids=lambda network: network.name)
def test_every_network_has_valid_settings_that_differ_in_what_its_name_states(network: Network) -> None:
    config = settings(network)
    reference = settings(Network(network.dataset, network.procedure, VARIANTS[0], network.seed))
    assert config.procedure.epochs == SETTINGS[network.dataset].epochs[network.procedure]
    assert config.seed == network.seed
    assert (config.stage == "two-phase") == (network.procedure == "two-phase")
    assert (config == reference) == (network.variant.name == "improved")
    if network.procedure != "two-phase":
        assert config.adversarial.objective == {"pgd-at": "madry", "trades": "trades"}[network.procedure]
        assert (config.adversarial.ema > 0, config.adversarial.awp > 0) == (network.procedure == "trades",) * 2
        assert config.adversarial.eps == pytest.approx(SETTINGS[network.dataset].eps, rel=0.1)
    assert (config.data, config.evaluation) == (reference.data, reference.evaluation)
    if network.variant.defence == "none":
        assert config.model.defence == "none"
        assert config.model.backbone == reference.model.backbone


def test_equal_steps_counts_the_fpds_optimizer_steps() -> None:
    network = Network("mnist", "two-phase", VARIANTS[2], 0)
    reference = settings(Network("mnist", "two-phase", VARIANTS[0], 0))
    config, ratio = study.with_equal_cost(network, settings(network), reference)
    assert ratio == pytest.approx(1 / 1.1)  # phase 2 in every eighth of 80 % of the batches
    assert config.training.epochs == round(1.1 * reference.training.epochs)


def _result(seed: int, robust: int) -> dict[str, Any]:
    record = EvaluationRecord(
        model_name="x", suite="standard", norm="linf", seed=0, batch_size=64, batch_size_auto=True,
        search_precision="fp32", every_attack=False, clean=Proportion.of(98, 100),
        worst_case=(WorstCase(eps=0.3, robust=Proportion.of(robust, 100)),), attacks=(), data_sha256="0" * 64,
        verdict=Verdict.of(()), settings_sha256="0" * 64, environment={},
    )  # fmt: skip
    return {
        "seed": seed, "epochs": 4 + seed, "train_seconds": 600.0, "record": record.model_dump(mode="json"),
    }  # fmt: skip


def test_a_row_has_the_mean_and_deviation_over_seeds_or_one_seeds_interval() -> None:
    several = study.row("mnist", "improved", [_result(0, 90), _result(1, 94)])
    assert several == "| mnist | improved | 4 or 5 | 10 | 100 | 98.0 ± 0.0 | 92.0 ± 2.8 | trusted |"
    low, high = (100 * v for v in (Proportion.of(90, 100).low, Proportion.of(90, 100).high))
    assert f"| 90.0 [{low:.1f}, {high:.1f}] | trusted |" in study.row("mnist", None, [_result(0, 90)])


def test_a_difference_has_a_paired_interval_with_one_seed_and_students_with_several() -> None:
    # Agresti & Min (2005): 1/2 is added to 12 and 4 images that one network alone classifies correctly, of 50
    first, second = set(range(4)) | {40, 41}, set(range(10, 22)) | {40, 41}
    centre = (12.5 - 4.5) / 52
    half = 1.959964 * ((12.5 + 4.5) / 52 - centre**2) ** 0.5 / 52**0.5
    expected = f"+16.0 [{100 * (centre - half):+.1f}, {100 * (centre + half):+.1f}]"
    assert study.difference([(first, second, 50)]) == expected
    seeds = [({0}, set(range(2 + seed)), 100) for seed in range(3)]
    assert study.difference(seeds) == f"+2.0 [{2 - 4.303 / 3**0.5:+.1f}, {2 + 4.303 / 3**0.5:+.1f}]"


def test_committed_results_have_the_settings_of_the_script() -> None:
    for network in plan():
        if network.path.is_file():
            result = json.loads(network.path.read_text())
            committed, expected = result["config"], settings(network).model_dump(mode="json")
            stage = "training" if network.procedure == "two-phase" else "adversarial"
            for values in (committed, expected):
                for field in ("epochs", "warmup"):  # follow from the cost
                    values[stage].pop(field, None)
                values["data"].pop("root")
                values.pop("evaluation")
                if stage == "training":
                    values.pop("adversarial")
            assert committed == expected, f"{network.path} has other settings; delete it and measure it again"
            wrong, record = set(result["wrong_robust"]), result["record"]
            assert set(result["wrong_clean"]) <= wrong
            assert len(wrong) == record["clean"]["total"] - record["worst_case"][-1]["robust"]["count"]


def test_the_tables_are_those_of_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {name: getattr(study, name) for name in ("PAGE", "README")}
    for name, page in pages.items():
        monkeypatch.setattr(study, name, Path(shutil.copy(page, tmp_path)))
    study.write_tables()
    for name, page in pages.items():
        assert getattr(study, name).read_text() == page.read_text()
    known = {network.name for network in plan()}
    assert {path.stem for path in study.RESULTS.glob("*.json")} <= known


@pytest.mark.slow
def test_a_network_is_trained_evaluated_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "HEADLINE", 12)
    monkeypatch.setitem(SETTINGS, "digits", replace(SETTINGS["digits"], epochs=dict.fromkeys(PROCEDURES, 1)))
    for procedure in PROCEDURES:
        network = Network("digits", procedure, VARIANTS[1], 0)
        result = study.measure(network, "data", tmp_path)
        assert result["record"]["num_images"] == 12
        assert result["epochs"] >= 1
        assert json.dumps(result)
        assert study.measure(network, "data", tmp_path)["record"] == result["record"]
