"""Laws: constants that are known come back, the gradient is right, and too little gives no law."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime

from livt_scale.study import scaling_law as laws
from livt_scale.study.scaling_law import LawPoint, fit_law, fit_table, held_out
from livt_scale.util.errors import DataError
from tests.scripts import load_script

coverage = load_script(Path(__file__).resolve().parents[2] / "benchmarks" / "fit_coverage.py")
TRUE = coverage.TRUE
QUICK = {"resamples": 20}


def made(noise=0.0, seed=0):
    return coverage.made(noise, np.random.default_rng(seed))


def test_without_noise_the_constants_come_back():
    found = fit_law(made(), resamples=2).law.constants
    assert found == pytest.approx(TRUE, rel=0.02)


@pytest.mark.parametrize("noise", [0.002, 0.01])
def test_with_noise_they_lie_within_the_intervals_of_most_fits(noise):
    held = [
        low <= TRUE[name] <= high
        for seed in range(3)
        for name, (low, high) in fit_law(made(noise, seed), resamples=40).intervals.items()
    ]
    assert sum(held) >= 0.7 * len(held), "they say 95 %; 15 constants, not independent of each other"


def test_the_gradient_is_that_of_the_objective():
    rng = np.random.default_rng(0)
    x, y, theta = rng.normal(size=(9, 2)), rng.normal(size=9), rng.normal(size=5)
    for delta in (1e-3, 0.5, 10):
        numeric = approx_fprime(theta, lambda t, d=delta: laws.objective(t, x, y, d)[0], 1e-7)
        assert laws.objective(theta, x, y, delta)[1] == pytest.approx(numeric, rel=1e-4, abs=1e-4 / delta)


def test_one_wild_run_moves_it_little():
    runs = made(0.002)
    wild = [LawPoint(r.n, r.d, r.loss * (1.5 if k == 7 else 1), r.name) for k, r in enumerate(runs)]
    (calm,), (stirred,) = (fit_law(of, resamples=2).law.at([5e5], [6]) for of in (runs, wild))
    assert stirred == pytest.approx(calm, rel=0.005)


@pytest.mark.parametrize(("over", "keep"), [("n", lambda r: r.d == 8), ("d", lambda r: r.n == 5e4)])
def test_where_one_quantity_varies_the_law_has_its_term_alone(over, keep):
    runs = [r for r in made() if keep(r)]
    if over == "d":
        runs += [
            LawPoint(5e4, d, TRUE["E"] + TRUE["A"] * 5e4 ** -TRUE["alpha"] + TRUE["B"] * d ** -TRUE["beta"])
            for d in (1, 16)
        ]
    fit = fit_law(runs, resamples=2)
    assert fit.law.over == (over,)
    assert set(fit.law.constants) == {"E", "A", "alpha"} if over == "n" else {"E", "B", "beta"}
    assert fit.law.at([r.n for r in runs], [r.d for r in runs]) == pytest.approx([r.loss for r in runs], rel=1e-3)


def test_the_largest_size_is_predicted_from_the_others():
    fit, largest = held_out(made(0.002), **QUICK)
    assert {run.n for run in largest} == {1.5e6}
    assert max(run.n for run in fit.runs) < 1.5e6
    mid, low, high = fit.predict([r.n for r in largest], [r.d for r in largest], of_a_run=True)
    assert (low <= mid).all()
    assert (mid <= high).all()
    assert mid == pytest.approx([r.loss for r in largest], rel=0.02)


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (lambda r: r.n > 4e5, "there are 2 sizes: a law needs at least 3"),
        (lambda r: r.d < 8, "there are 2 lengths"),
        (lambda r: r.n == 5e4 and r.d == 2, "nothing varies among 2 runs"),
        (
            lambda r: (r.n, r.d) in {(5e4, 2), (1.5e5, 4), (4.6e5, 8), (1.5e6, 8)},
            "there are 4 different runs but for seeds",
        ),
        (
            lambda r: r.d == 8 and r.n < 1e6,
            "there are 3 different runs but for seeds: a law needs at least 4; add other sizes",
        ),
        (lambda r: False, "nothing varies among 0 runs"),
    ],
)
def test_too_little_gives_no_law_and_says_what_is_missing(keep, said):
    fit = fit_law([r for r in made() if keep(r)])
    assert fit.law is None
    assert said in fit.problem
    assert fit.intervals == {}


@pytest.mark.parametrize("loss", [0.0, -1.0, math.nan, math.inf])
def test_a_loss_that_is_none_is_refused_by_name(loss):
    with pytest.raises(DataError, match="the bad one: n 5, d 2"):
        fit_law([*made(), LawPoint(5, 2, loss, "the bad one")])


def test_what_the_runs_do_not_determine_is_said():
    flat = [LawPoint(r.n, r.d, 0.5) for r in made()]
    assert "these runs do not determine it" in fit_law(flat, **QUICK).problem


@settings(max_examples=5)
@given(st.randoms(use_true_random=False), st.floats(1e-3, 1e3))
def test_order_does_not_matter_and_units_of_n_change_a_alone(random, unit):
    runs = made(0.002)
    mixed = [LawPoint(r.n * unit, r.d, r.loss, r.name) for r in random.sample(runs, len(runs))]
    plain, other = (fit_law(of, resamples=1).law.constants for of in (runs, mixed))
    assert other.pop("A") == pytest.approx(plain["A"] * unit ** plain["alpha"], rel=1e-2)
    assert other == pytest.approx({k: v for k, v in plain.items() if k != "A"}, rel=1e-3)


# --- of a study's table ---


def table(runs, measure="reconstruction_loss", **more):
    rows = [
        {
            "name": f"run-{k}", "state": "done", "axes": {"size": f"{r.n:g}", "epochs": r.d, "seed": k},
            "num_weights": r.n, "num_images": 100, "pretrain_epochs": r.d, "finetune_epochs": 1,
            "measures": {measure: r.loss},
        }
        for k, r in enumerate(runs)
    ]  # fmt: skip
    return {"runs": rows, **more}


def test_a_table_gives_plain_json_with_band_and_check():
    (one,) = fit_table(table(made(0.002)), measures=["reconstruction_loss"], **QUICK)
    assert one["law"] == "L = E + A·N^−α + B·D^−β"
    assert one["problem"] == ""
    assert one["over"] == ["num_weights", "epochs"]
    assert one["band"]["size"]["at"] == {"epochs": 8}
    assert all(a <= b <= c for a, b, c in zip(*(one["band"]["size"][k] for k in ("low", "mid", "high")), strict=True))
    assert len(one["held_out"]["points"]) == 6
    (error,) = fit_table(
        table([LawPoint(r.n, r.d, 1 - r.loss) for r in made(0.002)], "top1_all"), measures=["top1_all"], **QUICK
    )
    assert error["law"].startswith("1 − top1_all = E + ")
    assert error["parameters"] == pytest.approx(one["parameters"], rel=1e-6)
    assert error["band"]["size"]["mid"] == pytest.approx([1 - v for v in one["band"]["size"]["mid"]])


def test_a_run_without_a_mistake_keeps_one_measure_from_a_law_and_not_the_others():
    told = table(made(0.002))
    for row in told["runs"]:
        row["measures"]["top1_few"] = 0.9
    told["runs"][0]["measures"]["top1_few"] = 1.0
    loss, few = fit_table(told, measures=["reconstruction_loss", "top1_few"], **QUICK)
    assert loss["law"]
    assert few["problem"].startswith("run-0: ")
    assert "loss 0: " in few["problem"]


def test_runs_that_are_not_done_or_differ_in_something_else_give_no_law():
    runs = made()
    told = table(runs)
    for row in told["runs"]:
        row["state"] = "failed"
    (one,) = fit_table(told, measures=["reconstruction_loss"], **QUICK)
    assert one["problem"] == "no finished run has reconstruction_loss"
    told = table(runs)
    told["runs"][0]["axes"]["loss"] = "ce"
    (one,) = fit_table(told, measures=["reconstruction_loss"], **QUICK)
    assert "differ in loss too" in one["problem"]
    assert one["parameters"] == {}


def test_a_law_whose_constants_are_not_determined_is_no_law():
    (one,) = fit_table(
        table([LawPoint(r.n, r.d, 0.5 + 1e-4 * k) for k, r in enumerate(made())]),
        measures=["reconstruction_loss"],
        **QUICK,
    )
    assert one["problem"].endswith("these runs do not determine it")
    assert (one["law"], one["parameters"], one["band"], one["held_out"]["points"]) == ("", {}, {}, [])
    assert one["over"] == ["num_weights", "epochs"]


def test_an_exponent_that_could_be_any_is_not_determined():
    theta, over, y = np.array([-1.0, -1.0, 0.5]), ("n",), np.zeros(9)
    narrow = np.stack([theta - 0.1, theta + 0.1])
    assert laws._undetermined(theta, narrow, y, over) == ""
    wide = narrow.copy()
    wide[:, 2] = laws.EXPONENTS
    wide = np.repeat(wide, 100, axis=0)
    assert laws._undetermined(theta, wide, y, over).startswith("the interval of alpha is the search range")


def test_d_is_what_varies_epochs_or_images_or_both():
    runs, told = made(), {}
    for name, change in (("num_images", {"pretrain_epochs": 1}), ("images_seen", {})):
        rows = table(runs)
        for row, run in zip(rows["runs"], runs, strict=True):
            row |= {"num_images": 100 * run.d, **change}
        (told[name],) = fit_table(rows, measures=["reconstruction_loss"], **QUICK)
        assert told[name]["over"] == ["num_weights", name]
    assert told["num_images"]["parameters"]["beta"] == pytest.approx(TRUE["beta"], rel=0.05)
    assert told["images_seen"]["parameters"]["beta"] == pytest.approx(TRUE["beta"] / 2, rel=0.05)
