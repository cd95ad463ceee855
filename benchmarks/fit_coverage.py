"""How often the constants of a known law lie within the intervals that `livt study fit` gives: they say 95 %.

    python benchmarks/fit_coverage.py --trials 100

A law like that of a study here, runs of it with noise, fitted as a study's are. The fewer runs, and the more noise, the
less the constants are determined; the interval must know.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from livt_scale.study.scaling_law import LawPoint, fit_law
from livt_scale.util.atomic import write_atomic

TRUE = {"E": 0.45, "A": 6.0, "alpha": 0.35, "B": 0.25, "beta": 0.8}
SIZES, LENGTHS, SEEDS = (5e4, 1.5e5, 4.6e5, 1.5e6), (2, 4, 8), 2


def made(noise: float, rng: np.random.Generator) -> list[LawPoint]:
    """Runs of the true law, each times a log-normal noise."""

    def loss(n: float, d: float) -> float:
        return TRUE["E"] + TRUE["A"] * n ** -TRUE["alpha"] + TRUE["B"] * d ** -TRUE["beta"]

    return [
        LawPoint(n, d, loss(n, d) * float(np.exp(noise * rng.standard_normal())), f"{n:g}-{d}-{seed}")
        for n in SIZES
        for d in LENGTHS
        for seed in range(SEEDS)
    ]


def coverage(noise: float, *, trials: int) -> dict[str, float]:
    """Share of the trials whose interval holds the constant, by constant."""
    held = dict.fromkeys(TRUE, 0)
    for trial in range(trials):
        intervals = fit_law(made(noise, np.random.default_rng(trial))).intervals
        for name, (low, high) in intervals.items():
            held[name] += low <= TRUE[name] <= high
    return {name: count / trials for name, count in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.002, 0.01], help="deviation of log L")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    found = {noise: coverage(noise, trials=args.trials) for noise in args.noise}
    print(f"{len(SIZES)} sizes x {len(LENGTHS)} lengths x {SEEDS} seeds, {args.trials} trials a row")
    print(f"{'noise':<8}" + "".join(f"{name:>8}" for name in TRUE))
    for noise, held in found.items():
        print(f"{noise:<8g}" + "".join(f"{held[name]:8.0%}" for name in TRUE), flush=True)
    if args.json:
        write_atomic(args.json, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
