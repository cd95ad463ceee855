"""Fits a saturating power law, L = E + A·N^−α + B·D^−β, or the same with only one of the two terms.

Approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556, appendix D.2): with e = log E and so on, log L is the log-sum-exp
of e, a − α log N and b − β log D, and the Huber loss of its residuals is minimised by L-BFGS from many starts. Ours is
different in three ways. log N and log D are centred, so that a and b give a term's size in the middle of the points,
not at N = 1. Starts are a grid over the exponents only: with fixed exponents, E, A and B solve a least-squares
problem. The Huber loss is summed and divided by δ: averaged, its slopes are so small that L-BFGS stops early (Besiroglu
et al. 2024, arXiv 2404.10102).

theta [1 + 2k] = (e, a, α, b, β), k terms; x [n, k] = centred logs; y [n] = log L; all float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls
from threadpoolctl import threadpool_limits

from livt_scale.util.errors import DataError

Array = NDArray[np.float64]
EXPONENTS = (0.01, 3.0)  # bounds of α and β
MIN_SHARE, MAX_SHARE = 1e-5, 20.0  # bounds of E, and of a term amid the points, as shares of the typical loss
START_EXPONENTS = np.geomspace(0.05, 2.5, 12)
BEST_STARTS = 12  # of the grid, from which L-BFGS is run


def log_loss(theta: Array, x: Array) -> Array:
    """[…, n] log L of the law: for theta [1 + 2k], or for a batch [m, 1 + 2k]."""
    terms = _terms(np.asarray(theta), x)
    most = terms.max(axis=-1)
    return most + np.log(np.exp(terms - most[..., None]).sum(axis=-1))


def _terms(theta: Array, x: Array) -> Array:
    """[…, n, 1 + k] logs of what is summed: e, a − α x, b − β x."""
    powers = theta[..., None, 1::2] - theta[..., None, 2::2] * x
    constant = np.broadcast_to(theta[..., None, :1], (*powers.shape[:-1], 1))
    return np.concatenate([constant, powers], axis=-1)


def objective(theta: Array, x: Array, y: Array, delta: float) -> tuple[float, Array]:
    """(Huber loss / δ summed over the points, its gradient [1 + 2k])."""
    terms = _terms(theta, x)
    most = terms.max(axis=1, keepdims=True)
    parts = np.exp(terms - most)
    total = parts.sum(axis=1, keepdims=True)
    parts /= total  # [n, 1 + k] share of each term in L, which is also d log L / d term
    residual = (most + np.log(total))[:, 0] - y
    size = np.abs(residual)
    value = np.where(size <= delta, residual * residual / (2 * delta), size - delta / 2).sum()
    pull = np.clip(residual / delta, -1, 1) @ np.concatenate([parts, parts[:, 1:] * x], axis=1)
    gradient = np.empty_like(theta)
    gradient[0], gradient[1::2], gradient[2::2] = pull[0], pull[1 : parts.shape[1]], -pull[parts.shape[1] :]
    return float(value), gradient


def bounds(y: Array, num_terms: int) -> list[tuple[float, float]]:
    """Of theta."""
    typical = float(np.median(y))
    share = (typical + np.log(MIN_SHARE), typical + np.log(MAX_SHARE))
    return [share, *[share, EXPONENTS] * num_terms]


def starts(x: Array, y: Array, delta: float) -> Array:
    """[BEST_STARTS, 1 + 2k] the best of a grid over the exponents, best first."""
    low, high = np.array(bounds(y, x.shape[1])).T
    found = []
    for exponents in itertools.product(START_EXPONENTS, repeat=x.shape[1]):
        columns = np.column_stack([np.ones(len(y)), np.exp(-x * np.array(exponents))])
        amounts, _ = nnls(columns * np.exp(-y)[:, None], np.ones(len(y)))  # least squares of L_law / L − 1
        theta = np.empty(1 + 2 * x.shape[1])
        with np.errstate(divide="ignore"):  # log 0: clipped to the bound
            logs = np.log(amounts)
        theta[0], theta[1::2], theta[2::2] = logs[0], logs[1:], exponents
        theta = np.clip(theta, low, high)
        found.append((objective(theta, x, y, delta)[0], tuple(theta)))
    return np.array([theta for _, theta in sorted(found)[:BEST_STARTS]])


def best(x: Array, y: Array, delta: float, begin: Iterable[Array]) -> Array:
    """[1 + 2k] the lowest of the minima that L-BFGS comes to from `begin`."""
    within: Any = bounds(y, x.shape[1])
    options = {"maxiter": 500, "ftol": 1e-11, "gtol": 1e-7}
    results = [
        minimize(objective, theta, (x, y, delta), "L-BFGS-B", jac=True, bounds=within, options=options)
        for theta in begin
    ]
    lowest = min(results, key=lambda result: (result.fun, tuple(result.x)))
    return np.asarray(lowest.x)


Over = Literal["n", "d"]
DELTA = 1e-3  # of the Huber loss on log L: arXiv 2203.15556, appendix D.2
RESAMPLES, CONFIDENCE = 400, 0.95
MIN_VALUES = 3  # of N, of D: with two, any exponent fits
NAMES = {"n": ("A", "alpha"), "d": ("B", "beta")}
WORDS = {"n": "sizes", "d": "lengths"}


@dataclass(frozen=True)
class LawPoint:
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
        return np.exp(log_loss(self.theta, self._centred(n, d)))

    def _centred(self, n: Sequence[float], d: Sequence[float]) -> Array:
        logs = {"n": np.log(np.asarray(n, dtype=np.float64)), "d": np.log(np.asarray(d, dtype=np.float64))}
        return np.stack([logs[over] - centre for over, centre in zip(self.over, self.centres, strict=True)], axis=1)


@dataclass(frozen=True)
class Fit:
    """A law, or why it cannot be fitted. resampled: the laws of the bootstrap; residuals: of log L, widened."""

    runs: tuple[LawPoint, ...]
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
        """(mid, low, high) at each (n, d). of_a_run: include a run's noise, not only the law's uncertainty."""
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


def fit_law(runs: Sequence[LawPoint], *, delta: float = DELTA, resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """The law of `runs`, whatever their order. Raises DataError: a loss or a size that no law could have."""
    ordered = tuple(sorted(runs, key=lambda run: (run.n, run.d, run.loss, run.name)))
    for run in ordered:
        if not all(math.isfinite(v) and v > 0 for v in (run.n, run.d, run.loss)):
            values = f"n {run.n:g}, d {run.d:g}, loss {run.loss:g}"
            raise DataError(f"{run.name or 'a run'}: {values}: a law needs all above 0")
    over, problem = _determined(ordered)
    if problem:
        return Fit(ordered, problem=problem)
    logs = {"n": np.log([run.n for run in ordered]), "d": np.log([run.d for run in ordered])}
    centres = tuple(float(logs[name].mean()) for name in over)
    x = np.stack([logs[name] - centre for name, centre in zip(over, centres, strict=True)], axis=1)
    with threadpool_limits(1):  # threads that wait for each other over 24 numbers: 55 times slower on two cores
        return _fitted(ordered, x, over, centres, delta=delta, resamples=resamples, seed=seed)


def _fitted(
    runs: tuple[LawPoint, ...],
    x: Array,
    over: tuple[Over, ...],
    centres: tuple[float, ...],
    *,
    delta: float,
    resamples: int,
    seed: int,
) -> Fit:
    y = np.log([run.loss for run in runs])
    theta = best(x, y, delta, starts(x, y, delta))
    fitted = log_loss(theta, x)
    residuals = (y - fitted) * math.sqrt(len(y) / (len(y) - len(theta)))
    residuals = residuals - residuals.mean()
    width = 0.9 * float(residuals.std()) * len(y) ** -0.2
    rng = np.random.default_rng(seed)
    again = []
    for _ in range(resamples):
        drawn = fitted + rng.choice(residuals, size=len(y)) + width * rng.standard_normal(len(y))
        again.append(Law(best(x, drawn, delta, [theta]), over, centres))
    thetas = np.stack([law.theta for law in again])
    return Fit(runs, Law(theta, over, centres), _undetermined(theta, thetas, y, over), tuple(again), residuals)


def _determined(runs: Sequence[LawPoint]) -> tuple[tuple[Over, ...], str]:
    """What varies, or why that is too little for a law."""
    values: dict[Over, int] = {"n": len({run.n for run in runs}), "d": len({run.d for run in runs})}
    over = tuple(name for name, number in values.items() if number > 1)
    if not over:
        return (), f"nothing varies among {len(runs)} runs: a law needs at least {MIN_VALUES} sizes or lengths"
    for name in over:
        if values[name] < MIN_VALUES:
            return (), f"there are {values[name]} {WORDS[name]}: a law needs at least {MIN_VALUES}; add one"
    needed, cells = 2 + 2 * len(over), len({(run.n, run.d) for run in runs})
    if cells < needed:
        more = "another size, length" if len(over) == 2 else f"other {WORDS[over[0]]}"
        return (), f"there are {cells} different runs but for seeds: a law needs at least {needed}; add {more}"
    return over, ""


def _undetermined(theta: Array, again: Array, y: Array, over: Sequence[Over]) -> str:
    """Constants that the runs do not determine: at an end of the search range, or with all of it as their interval.

    again: [resamples, 1 + 2k] of the bootstrap.
    """
    found = []
    names = ["E", *(name for one in over for name in NAMES[one])]
    for name, value, resampled, (low, high) in zip(names, theta, again.T, bounds(y, len(over)), strict=True):
        first, last = _between(resampled.tolist())
        if value <= low + 1e-6 or value >= high - 1e-6:
            found.append(f"{name} is at the {'lower' if value <= low + 1e-6 else 'upper'} end of the search range")
        elif first <= low + 1e-6 and last >= high - 1e-6:
            found.append(f"the interval of {name} is the search range")
    return "; ".join(found) + (": these runs do not determine it" if found else "")


def held_out(runs: Sequence[LawPoint], **options: float | int) -> tuple[Fit, tuple[LawPoint, ...]]:
    """(the law of all but the largest size, the runs of that size)."""
    largest = max(run.n for run in runs)
    return (
        fit_law([run for run in runs if run.n < largest], **options),  # type: ignore[arg-type]
        tuple(run for run in runs if run.n == largest),
    )


BAND_POINTS = 24
LAWS = {("n",): "E + A·N^−α", ("d",): "E + B·D^−β", ("n", "d"): "E + A·N^−α + B·D^−β"}


def fit_table(table: Mapping[str, Any], *, measures: Sequence[str], resamples: int = RESAMPLES) -> list[dict[str, Any]]:
    """One answer a measure. Runs that are not done are left out, and so are those that differ in another axis."""
    return [_fit_measure(table, measure, resamples=resamples) for measure in measures]


def _fit_measure(table: Mapping[str, Any], measure: str, *, resamples: int) -> dict[str, Any]:
    is_accuracy = measure.startswith("top1")
    amount, runs, problem = _runs_of(table, measure, is_accuracy=is_accuracy)
    try:
        fit = Fit(tuple(runs), problem=problem) if problem else fit_law(runs, resamples=resamples)
    except DataError as error:  # a run without a mistake: another measure may have a law
        fit = Fit(tuple(runs), problem=error.message)
    told: dict[str, Any] = {
        "measure": measure,
        "over": [],
        "law": "",
        "parameters": {},
        "intervals": {},
        "num_points": len(runs),
        "band": {},
        "held_out": {"who": "", "points": []},
        "problem": fit.problem,  # why there is no law
    }
    if fit.law is None:
        return told
    told["over"] = [{"n": "num_weights", "d": amount}[name] for name in fit.law.over]
    if fit.problem:  # constants at a bound of the search: a fit, but no law that the runs determine
        return told
    left = f"1 − {measure}" if is_accuracy else "L"
    told |= {
        "law": f"{left} = {LAWS[fit.law.over]}",
        "parameters": fit.law.constants,
        "intervals": {name: list(of) for name, of in fit.intervals.items()},
        "band": _bands(fit, amount, is_accuracy=is_accuracy),
        "held_out": _check(runs, is_accuracy=is_accuracy, resamples=resamples),
    }
    return told


def _runs_of(table: Mapping[str, Any], measure: str, *, is_accuracy: bool) -> tuple[str, list[LawPoint], str]:
    """(what D is, runs with what they fell short of or lost, why they cannot be put together)."""
    done = [run for run in table["runs"] if run["state"] == "done" and measure in run["measures"]]
    epochs = [run["pretrain_epochs"] or run["finetune_epochs"] for run in done]
    images = [run["num_images"] for run in done]
    amount = "epochs" if len(set(images)) < 2 else "num_images" if len(set(epochs)) < 2 else "images_seen"
    seen = {"epochs": epochs, "num_images": images, "images_seen": [e * i for e, i in zip(epochs, images, strict=True)]}
    others = sorted({a for run in done for a in run["axes"]} - {"size", "epochs", "data_fraction", "seed"})
    varied = [axis for axis in others if len({run["axes"].get(axis) for run in done}) > 1]
    runs = []
    for run, d in zip(done, seen[amount], strict=True):
        value = run["measures"][measure]
        runs.append(LawPoint(run["num_weights"], d, 1 - value if is_accuracy else value, run["name"]))
    if not done:
        return amount, [], f"no finished run has {measure}"
    if varied:
        return amount, runs, f"the runs differ in {', '.join(varied)} too: a law is of runs that are alike in all else"
    return amount, runs, ""


def _bands(fit: Fit, amount: str, *, is_accuracy: bool) -> dict[str, Any]:
    """The law along each of its variables, the other one at its largest."""
    assert fit.law is not None
    n, d = (sorted({getattr(run, name) for run in fit.runs}) for name in ("n", "d"))
    found = {}
    of_d = {"num_images": "data_fraction"}.get(amount, amount)  # the axis along which D is drawn
    for name, along, key in (("n", n, "size"), ("d", d, of_d)):
        if name not in fit.law.over:
            continue
        x = np.geomspace(along[0], along[-1] * 2, BAND_POINTS)  # on to what a doubling would bring
        others = np.full(BAND_POINTS, d[-1] if name == "n" else n[-1])
        predicted = fit.predict(*((x, others) if name == "n" else (others, x)))
        mid, low, high = _as_measured(predicted, is_accuracy=is_accuracy)
        at = {amount: d[-1]} if name == "n" else {"num_weights": n[-1]}
        found[key] = {"x": x.tolist(), "mid": mid.tolist(), "low": low.tolist(), "high": high.tolist(), "at": at}
    return found


def _check(runs: Sequence[LawPoint], *, is_accuracy: bool, resamples: int) -> dict[str, Any]:
    """The largest size, predicted from the smaller ones. `problem` where those are too few for a law."""
    fit, largest = held_out(runs, resamples=resamples)
    if fit.law is None or fit.problem or "n" not in fit.law.over:
        return {
            "who": f"the largest size, {largest[0].n:,.0f} parameters",
            "points": [],
            "problem": fit.problem or "one size alone",
        }
    n, d = [run.n for run in largest], [run.d for run in largest]
    mid, low, high = _as_measured(fit.predict(n, d, of_a_run=True), is_accuracy=is_accuracy)
    points = []
    for k, run in enumerate(largest):
        measured = 1 - run.loss if is_accuracy else run.loss
        points.append(
            {
                "name": run.name, "predicted": float(mid[k]), "low": float(low[k]), "high": float(high[k]),
                "measured": measured, "relative_error": float(mid[k] / measured - 1) if measured else None,
            }
        )  # fmt: skip
    return {"who": f"the largest size, {largest[0].n:,.0f} parameters", "points": points, "problem": ""}


def _as_measured(predicted: tuple[Any, Any, Any], *, is_accuracy: bool) -> tuple[Any, Any, Any]:
    mid, low, high = predicted
    return (1 - mid, 1 - high, 1 - low) if is_accuracy else (mid, low, high)
