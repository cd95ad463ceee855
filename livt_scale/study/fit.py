"""Laws fitted to a study's runs, with intervals, and the largest size held out as a check.

    fit = fit_law([Run(n=0.1e6, d=4, loss=0.55, name="nano-epochs-4"), …])
    fit.law.constants                   {"E": 0.41, "A": 12.3, "alpha": 0.42, "B": 0.3, "beta": 0.9}
    fit.intervals["alpha"]              (0.31, 0.58): 95 %, by bootstrap
    fit.predict([1e6], [16])            (mid, low, high) of the law itself

Where N or D alone varies the law has that term alone. Too few sizes, lengths or runs: no law, and `problem` says what
is missing. Intervals are of a smoothed residual bootstrap: residuals of log L, widened by √(n / (n − p)) because p
constants were fitted to them, are drawn anew onto the law, with normal noise of Silverman's width on top (a Huber loss
with a small δ is nearly a sum of absolute values, whose plain bootstrap is too narrow), and the law is fitted again.
`benchmarks/fit_coverage.py` measures how often the true constants lie within.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from threadpoolctl import threadpool_limits

from livt_scale.errors import DataError
from livt_scale.study import law as laws
from livt_scale.study.law import Array

Over = Literal["n", "d"]
DELTA = 1e-3  # of the Huber loss on log L: arXiv 2203.15556, appendix D.2
RESAMPLES, CONFIDENCE = 400, 0.95
LEAST_VALUES = 3  # of N, of D: with two, any exponent fits
NAMES = {"n": ("A", "alpha"), "d": ("B", "beta")}
WORDS = {"n": "sizes", "d": "lengths"}


@dataclass(frozen=True)
class Run:
    """One measured run. n: weights; d: how much was trained, in epochs or images; loss: above 0."""

    n: float
    d: float
    loss: float
    name: str = ""


@dataclass(frozen=True)
class Law:
    """theta (`law`) with the centres of log N and log D that it is about."""

    theta: Array
    over: tuple[Over, ...]
    centres: tuple[float, ...]

    @property
    def constants(self) -> dict[str, float]:
        """E, and A, alpha and B, beta as far as they are in it, for N and D in their own units."""
        found = {"E": math.exp(self.theta[0])}
        for k, (over, centre) in enumerate(zip(self.over, self.centres, strict=True)):
            amount, exponent = NAMES[over]
            found[amount] = math.exp(min(self.theta[1 + 2 * k] + self.theta[2 + 2 * k] * centre, 700.0))
            found[exponent] = float(self.theta[2 + 2 * k])
        return found

    def at(self, n: Sequence[float], d: Sequence[float]) -> Array:
        """L at each (n, d)."""
        return np.exp(laws.log_loss(self.theta, self._centred(n, d)))

    def _centred(self, n: Sequence[float], d: Sequence[float]) -> Array:
        logs = {"n": np.log(np.asarray(n, dtype=np.float64)), "d": np.log(np.asarray(d, dtype=np.float64))}
        return np.stack([logs[over] - centre for over, centre in zip(self.over, self.centres, strict=True)], axis=1)


@dataclass(frozen=True)
class Fit:
    """A law, or why there is none. resampled: the laws of the bootstrap; residuals: of log L, widened."""

    runs: tuple[Run, ...]
    law: Law | None = None
    problem: str = ""
    resampled: tuple[Law, ...] = ()
    residuals: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        if self.law is None:
            return {}
        every = [law.constants for law in self.resampled]
        return {name: _between([one[name] for one in every]) for name in self.law.constants}

    def predict(self, n: Sequence[float], d: Sequence[float], *, of_a_run: bool = False) -> tuple[Array, Array, Array]:
        """(mid, low, high) at each (n, d). of_a_run: with the noise that a run has, not the law's own doubt alone."""
        assert self.law is not None, self.problem
        every = np.stack([law.at(n, d) for law in self.resampled])
        if of_a_run:
            rng = np.random.default_rng(1)
            every = every * np.exp(rng.choice(self.residuals, size=every.shape))
        low, high = np.quantile(every, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
        return self.law.at(n, d), low, high


def _between(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def fit_law(runs: Sequence[Run], *, delta: float = DELTA, resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """The law of `runs`, whatever their order. Raises DataError: a loss or a size that no law could have."""
    ordered = tuple(sorted(runs, key=lambda run: (run.n, run.d, run.loss, run.name)))
    for run in ordered:
        if not all(math.isfinite(v) and v > 0 for v in (run.n, run.d, run.loss)):
            raise DataError(f"{run.name or 'a run'}: n {run.n:g}, d {run.d:g}, loss {run.loss:g}: all are above 0")
    over, problem = _terms(ordered)
    if problem:
        return Fit(ordered, problem=problem)
    logs = {"n": np.log([run.n for run in ordered]), "d": np.log([run.d for run in ordered])}
    centres = tuple(float(logs[name].mean()) for name in over)
    x = np.stack([logs[name] - centre for name, centre in zip(over, centres, strict=True)], axis=1)
    with threadpool_limits(1):  # threads that wait for each other over 24 numbers: 55 times slower on two cores
        return _fitted(ordered, x, over, centres, delta=delta, resamples=resamples, seed=seed)


def _fitted(
    runs: tuple[Run, ...],
    x: Array,
    over: tuple[Over, ...],
    centres: tuple[float, ...],
    *,
    delta: float,
    resamples: int,
    seed: int,
) -> Fit:
    y = np.log([run.loss for run in runs])
    theta = laws.best(x, y, delta, laws.starts(x, y, delta))
    fitted = laws.log_loss(theta, x)
    residuals = (y - fitted) * math.sqrt(len(y) / (len(y) - len(theta)))
    residuals = residuals - residuals.mean()
    width = 0.9 * float(residuals.std()) * len(y) ** -0.2
    rng = np.random.default_rng(seed)
    again = []
    for _ in range(resamples):
        drawn = fitted + rng.choice(residuals, size=len(y)) + width * rng.standard_normal(len(y))
        again.append(Law(laws.best(x, drawn, delta, [theta]), over, centres))
    return Fit(runs, Law(theta, over, centres), _at_a_bound(theta, y, over), tuple(again), residuals)


def _terms(runs: Sequence[Run]) -> tuple[tuple[Over, ...], str]:
    """What varies, or why that is too little for a law."""
    values: dict[Over, int] = {"n": len({run.n for run in runs}), "d": len({run.d for run in runs})}
    over = tuple(name for name, number in values.items() if number > 1)
    if not over:
        return (), f"nothing varies among {len(runs)} runs: a law needs at least {LEAST_VALUES} sizes or lengths"
    for name in over:
        if values[name] < LEAST_VALUES:
            return (), f"there are {values[name]} {WORDS[name]}: a law needs at least {LEAST_VALUES}; add one"
    needed, cells = 2 + 2 * len(over), len({(run.n, run.d) for run in runs})
    if cells < needed:
        more = "another size, length" if len(over) == 2 else f"other {WORDS[over[0]]}"
        return (), f"there are {cells} different runs but for seeds: a law needs at least {needed}; add {more}"
    return over, ""


def _at_a_bound(theta: Array, y: Array, over: Sequence[Over]) -> str:
    """Constants that the runs do not determine: they stand where we stopped looking."""
    said = []
    names = ["E", *(name for one in over for name in NAMES[one])]
    for name, value, (low, high) in zip(names, theta, laws.bounds(y, len(over)), strict=True):
        if value <= low + 1e-6 or value >= high - 1e-6:
            said.append(f"{name} is at the {'lower' if value <= low + 1e-6 else 'upper'} end of what is looked at")
    return "; ".join(said) + (": these runs do not determine it" if said else "")


def held_out(runs: Sequence[Run], **options: float | int) -> tuple[Fit, tuple[Run, ...]]:
    """(the law of all but the largest size, the runs of that size)."""
    largest = max(run.n for run in runs)
    return (
        fit_law([run for run in runs if run.n < largest], **options),  # type: ignore[arg-type]
        tuple(run for run in runs if run.n == largest),
    )
