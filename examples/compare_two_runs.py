"""Train an FPD and its undefended baseline on the same noise, evaluate both, and write one report.

python examples/compare_two_runs.py OUT_FOLDER
"""

import sys
from pathlib import Path

import robustfpd as rf
from robustfpd.cli import main

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/compare-two-runs")
fpd = rf.recipe("digits/mini", ["training.epochs=1"])
runs = {out / "fpd": fpd, out / "baseline": fpd.baseline()}  # the baseline takes as many optimizer steps
for folder, config in runs.items():
    result = rf.train(config, folder, device="cpu", precision="fp32")
    images = rf.data.load(config.data).test.floats()
    record = rf.evaluate(
        result.model, images, suite="first-look", eps=(0.05, 0.1), num_images=64, out_dir=folder / "evaluation",
        record_name="digits-first-look-linf",
    )  # fmt: skip
    print(f"{folder.name}: clean {record.clean}, robust at eps 0.1 {record.worst_case[-1].robust}")
main(["report", *map(str, runs), "--out", str(out / "report.html")])
