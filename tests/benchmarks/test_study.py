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
    for dataset, procedure in ABLATED:
        for change in ABLATION[procedure]:
            assert f"{dataset}-{procedure}-{change}-0" in names
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


def test_a_row_has_the_mean_the_deviation_over_seeds_and_the_interval_of_the_first() -> None:
    low, high = (100 * v for v in (Proportion.of(90, 100).low, Proportion.of(90, 100).high))
    line = study.row("mnist", "improved", [_result(0, 90), _result(1, 94)])
    assert line.startswith("| mnist | improved | 4 or 5 | 10 | 98.0 ± 0.0 [")
    assert f"| 92.0 ± 2.8 [{low:.1f}, {high:.1f}] | trusted |" in line
    assert f"| 90.0 [{low:.1f}, {high:.1f}] | trusted |" in study.row("mnist", None, [_result(0, 90)])


def test_a_difference_has_newcombes_interval_with_one_seed_and_students_with_several() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table II: 56/70 and 48/80, method 10
    one = study.difference([(Proportion.of(56, 70), Proportion.of(48, 80))])
    assert one == "+20.0 [+5.2, +33.4]"
    three = study.difference([(Proportion.of(90 + d, 100), Proportion.of(90, 100)) for d in (1, 2, 3)])
    assert three == f"+2.0 [{2 - 4.303 / 3**0.5:+.1f}, {2 + 4.303 / 3**0.5:+.1f}]"


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
