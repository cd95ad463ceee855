"""A saturating power law and how its constants are found: L = E + A·N^−α + B·D^−β, or with one of the two terms alone.

Approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556, appendix D.2): with e = log E and so on, log L is the log-sum-exp
of e, a − α log N and b − β log D, and the Huber loss of its residuals is minimised by L-BFGS from many starts. Ours is
different in three ways. log N and log D are centred, so that a and b say what a term is worth amid the points, and not
at N = 1. Starts are a grid over the exponents alone: with those held, E, A and B are a least-squares problem that is
solved. The Huber loss is summed and divided by δ: averaged, its slopes are so small that L-BFGS stops early (Besiroglu
et al. 2024, arXiv 2404.10102).

theta [1 + 2k] = (e, a, α, b, β), k terms; x [n, k] = centred logs; y [n] = log L; all float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

Array = NDArray[np.float64]
EXPONENTS = (0.01, 3.0)  # bounds of α and β
LEAST_SHARE, MOST_SHARE = 1e-5, 20.0  # bounds of E, and of a term amid the points, as shares of the typical loss
START_EXPONENTS = np.geomspace(0.05, 2.5, 12)
BEST_STARTS = 12  # of the grid, from which L-BFGS is run


def log_loss(theta: Array, x: Array) -> Array:
    """[…, n] log L of the law: for theta [1 + 2k], or for many [m, 1 + 2k] at once."""
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
    share = (typical + np.log(LEAST_SHARE), typical + np.log(MOST_SHARE))
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
