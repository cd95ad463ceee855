"""Temperature: the minimum that other methods find, bounds, and what is fitted on which half."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from livt_scale.evaluation.calibration import LARGEST, SMALLEST, fit_temperature, log_loss
from livt_scale.evaluation.holdout import halves
from livt_scale.evaluation.report import make_report
from tests.evaluation.made import outputs


def plain_log_loss(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        scaled = [z / temperature for z in row]
        top = max(scaled)
        total += top + math.log(sum(math.exp(z - top) for z in scaled)) - scaled[label]
    return total / len(labels)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 100), scale=st.sampled_from([0.05, 0.5, 1.0, 4.0, 60.0]))
def test_it_is_the_minimum_that_a_search_finds(seed: int, scale: float) -> None:
    made = outputs(150, seed=seed)
    logits = made.logits * scale
    found = fit_temperature(logits, made.labels)
    assert not found.at_bound
    searched = minimize_scalar(
        lambda t: plain_log_loss(logits, made.labels, math.exp(t)), bounds=(-6, 6), method="bounded"
    )
    assert math.log(found.value) == pytest.approx(searched.x, abs=2e-3)
    assert log_loss(logits, made.labels, found.value) <= searched.fun + 1e-9


def test_lbfgs_finds_the_same() -> None:
    made = outputs(400, seed=7)
    beta = torch.ones((), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([beta], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(made.logits.double() * beta, made.labels)
        loss.backward()
        return loss

    solver.step(closure)
    assert fit_temperature(made.logits, made.labels).value == pytest.approx(1 / beta.item(), rel=1e-6)


@given(factor=st.floats(0.05, 20))
@settings(max_examples=15, deadline=None)
def test_a_scaled_model_gets_a_scaled_temperature(factor: float) -> None:
    made = outputs(100)
    plain = fit_temperature(made.logits, made.labels).value
    assert fit_temperature(made.logits.double() * factor, made.labels).value == pytest.approx(plain * factor, rel=1e-6)


def test_where_no_temperature_is_best_the_bound_says_so() -> None:
    labels = torch.tensor([0, 1, 1])
    right = torch.nn.functional.one_hot(labels, 2).float()
    assert (fit_temperature(right, labels).value, fit_temperature(right, labels).at_bound) == (SMALLEST, True)
    assert (fit_temperature(-right, labels).value, fit_temperature(-right, labels).at_bound) == (LARGEST, True)
    flat = fit_temperature(torch.full((3, 2), 7.0), labels)
    assert (flat.value, flat.at_bound) == (1.0, False)


def test_it_is_fitted_on_one_half_and_reported_on_the_other() -> None:
    made = outputs(300)
    made = made.with_logits(made.logits * 5)  # far too sure
    chosen, reported = halves(made)
    told = make_report(made, temperature=True).report["temperature"]
    value = fit_temperature(chosen.logits, chosen.labels).value
    assert told["temperature"] == value > 3
    assert (told["fitted_on"], told["reported_on"]) == (150, 150)
    assert told["before"]["ece"] == reported.report()["calibration"]["ece"]
    after = reported.with_logits(reported.logits / value)
    assert told["after"]["ece"] == pytest.approx(after.report()["calibration"]["ece"], abs=1e-6)
    assert told["after"]["nll"] == pytest.approx(plain_log_loss(reported.logits, reported.labels, value), abs=1e-6)
    assert told["before"]["nll"] == pytest.approx(plain_log_loss(reported.logits, reported.labels, 1.0), abs=1e-6)
    assert told["after"]["ece"] < told["before"]["ece"]
    assert told["after"]["nll"] < told["before"]["nll"]


def test_with_a_chosen_tau_it_is_fitted_to_the_adjusted_logits() -> None:
    made = outputs(300)
    told = make_report(made, tau="auto", temperature=True)
    chosen, _ = halves(made)
    from livt_scale.evaluation.adjust import adjusted

    best = adjusted(chosen, told.report["adjustment"]["tau"])
    assert told.report["temperature"]["temperature"] == fit_temperature(best.logits, best.labels).value
    assert told.report["temperature"]["reported_on"] == told.report["num_samples"] == 150
    assert told.report["temperature"]["before"]["ece"] == told.report["calibration"]["ece"]
    assert np.isfinite(told.report["temperature"]["after"]["nll"])
