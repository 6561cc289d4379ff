"""Benchmarks: cost of the FPD, its training and the attacks, relative to the baseline and to other libraries.

`python -m benchmarks` (`make bench`) measures and writes `results/benchmark/DEVICE.json` and `docs/benchmarks.md`. The
other scripts of this folder run alone: `python benchmarks/NAME.py --help`.
"""
