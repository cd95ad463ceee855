"""Logit adjustment: sign and formula, what is chosen on which half, models trained with a margin."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.evaluation import adjust
from livt_scale.evaluation.holdout import half_rows, halves
from livt_scale.evaluation.report import make_report
from livt_scale.losses import make_loss
from livt_scale.util.errors import DataError, UsageError
from tests.evaluation.made import COUNTS, outputs


@pytest.mark.parametrize("tau", [-1.0, 0.0, 0.5, 1.5])
@pytest.mark.parametrize("loss", ["ce", "bal_ce", "lade", "ldam", "bce", "bal_bce", "focal"])
def test_the_margin_is_taken_off_as_a_plain_loop_does(loss: str, tau: float) -> None:
    made = outputs(20, loss=loss)
    found = adjust.adjusted(made, tau).logits
    total = sum(COUNTS)
    for row, plain in zip(found.tolist(), made.logits.tolist(), strict=True):
        for c, n in enumerate(COUNTS):
            sigmoid = loss in ("bce", "bal_bce", "focal")
            off = math.log(n / (total - n)) if sigmoid else math.log(n / total) / (30 if loss == "ldam" else 1)
            assert row[c] == pytest.approx(plain[c] - tau * off, abs=1e-5)


def test_by_hand_the_rare_class_wins() -> None:
    found = adjust.adjust(torch.tensor([[1.0, 0.0]]), 1.0, loss="ce", class_counts=[90, 10])
    assert found[0].tolist() == pytest.approx([1 - math.log(0.9), -math.log(0.1)])
    assert found.argmax() == 1


@pytest.mark.parametrize(("trained", "plain"), [("bal_ce", "ce"), ("bal_bce", "bce")])
def test_it_is_the_margin_of_the_balanced_losses_with_the_other_sign(trained: str, plain: str) -> None:
    margin = make_loss(trained, COUNTS).by_class
    assert margin is not None
    np.testing.assert_allclose(adjust.margin(plain, COUNTS), margin.numpy(), rtol=1e-12)
    # so τ = -1 gives a model that was trained with the margin back what its loss saw
    made = outputs(5, loss=trained)
    torch.testing.assert_close(adjust.adjusted(made, -1.0).logits, made.logits + margin.float())


@given(counts=st.lists(st.integers(1, 10**8), min_size=2, max_size=30))
def test_margins_are_finite_and_larger_for_larger_classes(counts: list[int]) -> None:
    for loss in ("ce", "bal_bce"):
        margin = adjust.margin(loss, counts)
        assert np.isfinite(margin).all()
        assert (np.diff(margin[np.argsort(counts)]) >= -1e-9).all()


def test_a_known_posterior_becomes_the_balanced_one() -> None:
    """Two Gaussians of prior 0.95 and 0.05: τ = 1 puts the border where a uniform prior has it."""
    x = torch.linspace(-2, 5, 701, dtype=torch.float64)
    prior = torch.tensor([0.95, 0.05], dtype=torch.float64)
    log_joint = torch.stack([-(x**2) / 2, -((x - 1) ** 2) / 2], dim=1) + prior.log()
    plain, balanced = log_joint, adjust.adjust(log_joint, 1.0, loss="ce", class_counts=[95, 5])
    assert float(x[plain.argmax(1) == 1].min()) == pytest.approx(0.5 + math.log(19), abs=0.011)
    assert float(x[balanced.argmax(1) == 1].min()) == pytest.approx(0.5, abs=0.011)


def test_a_class_without_training_images_is_an_error() -> None:
    with pytest.raises(DataError, match="class 1 has no image"):
        make_report(outputs(10, counts=(5, 0, 5)), tau="1")


def test_what_stands_behind_tau() -> None:
    assert adjust.parse_taus("0, 0.5,1,0.5") == (0.0, 0.5, 1.0)
    assert adjust.parse_taus("-1") == (-1.0,)
    assert adjust.parse_taus("auto") is None
    for text in ("", "a", "1,,2", "nan", "inf", "0.5;1"):
        with pytest.raises(UsageError, match="--tau"):
            adjust.parse_taus(text)


def test_the_sweep_counts_as_a_plain_loop_does() -> None:
    made = outputs(200, loss="ce")
    rows = adjust.sweep(made, (0.0, 1.0))
    for row in rows:
        right: dict[int, list[bool]] = {c: [] for c in range(5)}
        for z, label in zip(made.logits.double().tolist(), made.labels.tolist(), strict=True):
            shifted = [v - row["tau"] * math.log(n / sum(COUNTS)) for v, n in zip(z, COUNTS, strict=True)]
            right[label].append(shifted.index(max(shifted)) == label)
        by_class = [np.mean(right[c]) for c in range(5)]
        assert row["top1"]["all"] == pytest.approx(np.mean([hit for hits in right.values() for hit in hits]))
        assert row["top1"]["many"] == pytest.approx(np.mean(by_class[:2]))
        assert row["top1"]["medium"] == pytest.approx(by_class[2])
        assert row["top1"]["few"] == pytest.approx(np.mean(by_class[3:]))
    assert rows[1]["top1"]["few"] > rows[0]["top1"]["few"]


def test_of_equal_taus_the_nearest_to_zero_is_taken() -> None:
    def row(tau: float, value: float) -> dict[str, object]:
        return {"tau": tau, "top1": {"mean_class": value}}

    assert adjust.best([row(-1, 0.5), row(-0.2, 0.7), row(0.3, 0.7), row(1.0, 0.6)]) == -0.2


# --- the halves ---


@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=60))
def test_halves_are_disjoint_whole_and_split_each_class(labels: list[int]) -> None:
    both = np.array(labels)
    one, other = half_rows(both)
    assert sorted([*one, *other]) == list(range(len(labels)))
    assert abs(len(one) - len(other)) <= 1
    for c in range(5):
        assert abs((both[one] == c).sum() - (both[other] == c).sum()) <= 1
    again = half_rows(both)
    np.testing.assert_array_equal(one, again[0])


def test_auto_chooses_on_one_half_and_reports_on_the_other() -> None:
    made = outputs(401, loss="ce")
    made.logits.add_(torch.from_numpy(2 * np.log(np.array(COUNTS) / sum(COUNTS))).float())  # far too fond of the head
    chosen, reported = halves(made)
    told = make_report(made, tau="auto")
    tau = told.report["adjustment"]["tau"]
    assert told.report["adjustment"]["chosen_on"] == len(chosen.keys) == 201
    assert told.report["num_samples"] == len(reported.keys) == 200
    assert 1.0 <= tau <= 2.0
    scores = {t: adjust.adjusted(chosen, t).report()["top1"]["mean_class"] for t in adjust.AUTO_TAUS}
    assert scores[tau] == max(scores.values())
    assert told.report["top1"] == adjust.adjusted(reported, tau).report()["top1"]
    # what is reported on has no say: with the labels of that half turned round, the choice is the same
    rows = [i for i, key in enumerate(made.keys) if key in set(reported.keys)]
    made.logits[rows] = made.logits[rows].flip(1)
    assert make_report(made, tau="auto").report["adjustment"]["tau"] == tau


def test_one_image_cannot_be_halved() -> None:
    with pytest.raises(DataError, match="cannot be halved"):
        make_report(outputs(1), tau="auto")


def test_one_tau_makes_the_report_one_of_adjusted_logits_and_several_do_not() -> None:
    made = outputs(100)
    plain = made.report()
    one, several = make_report(made, tau="1").report, make_report(made, tau="0,1").report
    assert several["top1"] == plain["top1"] == several["tau_sweep"][0]["top1"]
    assert one["top1"] == several["tau_sweep"][1]["top1"] != plain["top1"]
    assert one["adjustment"] == {"tau": 1.0, "formula": "z - tau * log(prior)", "trained_with": "ce"}
    assert make_report(made, tau="0").report["top1"] == plain["top1"]
    assert "adjustment" not in make_report(made).report
