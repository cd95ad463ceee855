"""Losses against a reckoning in float64 that sums over samples and classes one by one, by the paper's formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from livt_scale.errors import DataError, UsageError
from livt_scale.losses import LOSSES, make_loss, soft_targets
from livt_scale.recipe import LOSS_NAMES

COUNTS = (500, 120, 60, 9, 1)


def reckon(name, z, t, counts, tau=1.0):
    """(loss, its gradient by z), both float64, from sums written out."""
    total = sum(counts)
    gradient = np.zeros_like(z)
    loss = 0.0
    for b in range(len(z)):
        row = []
        for c, n in enumerate(counts):
            margin = {
                "bal_ce": tau * math.log(n / total),
                "bal_bce": tau * math.log((n / total) / ((total - n) / total)),
            }.get(name, 0.0)
            row.append(z[b, c] + margin)
        if name.endswith("bce"):
            for c, x in enumerate(row):
                sigmoid = 1 / (1 + math.exp(-x))
                loss -= t[b, c] * math.log(sigmoid) + (1 - t[b, c]) * math.log(1 - sigmoid)
                gradient[b, c] = sigmoid - t[b, c]
        else:
            norm = math.log(sum(math.exp(x) for x in row))
            for c, x in enumerate(row):
                loss -= t[b, c] * (x - norm)
                gradient[b, c] = math.exp(x - norm) * sum(t[b]) - t[b, c]
    return loss / len(z), gradient / len(z)


def batch(seed=0, size=6, *, num_classes=5, smoothing=0.1, mixed=True):
    random = np.random.default_rng(seed)
    z = 3 * random.standard_normal((size, num_classes))
    t = soft_targets(torch.from_numpy(random.integers(num_classes, size=size)), num_classes, smoothing).double()
    if mixed:  # as mixup leaves them
        t = 0.3 * t + 0.7 * t.flip(0)
    return z, t.numpy()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [("ce", {}), ("bce", {})] + [(n, {"tau": t}) for n in ("bal_ce", "bal_bce") for t in (0.0, 0.5, 1.0, 1.05, 2.0)],
)
def test_value_and_gradient_equal_the_reckoning(name, options, smoothing, mixed):
    z, t = batch(smoothing=smoothing, mixed=mixed)
    expected, slope = reckon(name, z, t, COUNTS, **options)
    loss = make_loss(name, COUNTS, **options)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        logits = torch.tensor(z, dtype=dtype, requires_grad=True)
        value = loss(logits, torch.tensor(t, dtype=torch.float32 if dtype == torch.float32 else dtype))
        value.backward()
        assert value.item() == pytest.approx(expected, rel=tolerance)
        np.testing.assert_allclose(logits.grad.numpy(), slope, rtol=tolerance * 10, atol=tolerance)


@pytest.mark.parametrize(("balanced", "plain"), [("bal_ce", "ce"), ("bal_bce", "bce")])
def test_without_strength_a_balanced_loss_is_the_plain_one(balanced, plain):
    z, t = (torch.from_numpy(x) for x in batch())
    assert make_loss(balanced, COUNTS, tau=0)(z, t) == make_loss(plain, COUNTS)(z, t)


def test_the_margin_of_two_classes_is_the_log_of_their_odds():
    margin = make_loss("bal_bce", (90, 10)).margin
    np.testing.assert_allclose(margin, [math.log(9), -math.log(9)])


def test_equal_counts_shift_all_classes_alike_and_leave_cross_entropy_as_it_is():
    z, t = (torch.from_numpy(x) for x in batch())
    value = make_loss("bal_ce", [7] * 5)(z, t).item()
    assert value == pytest.approx(make_loss("ce", [7] * 5)(z, t).item(), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 10**8), min_size=2, max_size=12),
    name=st.sampled_from(sorted(LOSSES)),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    scale=st.sampled_from([0.0, 1.0, 1000.0, 60000.0]),
)
def test_values_and_gradients_stay_finite_for_any_counts_and_precision(counts, name, dtype, scale):
    z, t = batch(num_classes=len(counts))
    logits = (torch.from_numpy(z) / np.abs(z).max() * scale).to(dtype).requires_grad_()
    value = make_loss(name, counts)(logits, torch.from_numpy(t).float())
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("counts", [(10**8, 1), (1, 10**8), (10**15, 1)])
def test_a_class_of_one_image_among_a_hundred_millions_keeps_its_margin(counts):
    margin = make_loss("bal_bce", counts).margin
    ratio = math.log(counts[0] / counts[1])
    np.testing.assert_allclose(margin, [ratio, -ratio], rtol=1e-14)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_half_precision_logits_are_reckoned_in_float32(name):
    z, t = batch()
    half = torch.tensor(z, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = make_loss(name, COUNTS)(half, torch.from_numpy(t).float())
    expected, _ = reckon(name, half.double().numpy(), t, COUNTS)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_one_loss_serves_precisions_in_turn():
    z, t = (torch.from_numpy(x) for x in batch())
    loss = make_loss("bal_bce", COUNTS)
    before = loss(z, t)
    loss(z.float(), t.float())
    assert loss(z, t) == before


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_class_without_images_is_named(name):
    with pytest.raises(DataError, match="class 2 has no image"):
        make_loss(name, (5, 4, 0, 3))
    with pytest.raises(DataError, match=r"class 1 \(and 2 more\) has no image"):
        make_loss(name, (5, 0, 0, 0))


@pytest.mark.parametrize("counts", [(5, -1), (5, 1.5), (5, math.nan), (5, math.inf)])
def test_an_impossible_count_is_named(counts):
    with pytest.raises(DataError, match="class 1 has an impossible count"):
        make_loss("ce", counts)


@pytest.mark.parametrize("counts", [(), 5, ((1, 2), (3, 4))])
def test_counts_of_another_shape_are_refused(counts):
    with pytest.raises(DataError, match="one number a class"):
        make_loss("ce", counts)


def test_a_single_class_has_no_finite_margin_in_bal_bce():
    with pytest.raises(DataError, match="single class"):
        make_loss("bal_bce", [30])


def test_an_unknown_loss_gets_the_nearest_name():
    with pytest.raises(UsageError, match="Did you mean 'bal_bce'"):
        make_loss("balbce", COUNTS)


def test_an_option_that_has_no_effect_is_refused():
    with pytest.raises(UsageError, match="'ce' does not take 'tau'"):
        make_loss("ce", COUNTS, tau=1.0)
    with pytest.raises(UsageError, match="Its options: tau"):
        make_loss("bal_ce", COUNTS, gamma=2)
    make_loss("ce", COUNTS, tau=None)  # None: not given


@pytest.mark.parametrize("tau", [-0.1, math.nan, math.inf])
def test_an_impossible_strength_is_refused(tau):
    with pytest.raises(UsageError, match="tau"):
        make_loss("bal_bce", COUNTS, tau=tau)


def test_smoothed_targets_are_as_published_and_sum_to_one():
    targets = soft_targets(torch.tensor([2, 0]), 4, 0.1)
    assert targets.dtype == torch.float32
    expected = [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]
    np.testing.assert_allclose(targets, expected, rtol=1e-6)
    assert soft_targets(torch.tensor([1]), 3, 0.0).tolist() == [[0.0, 1.0, 0.0]]


def test_the_recipe_offers_exactly_these_losses():
    assert set(LOSSES) == set(LOSS_NAMES)


def test_shapes_that_differ_are_our_own_mistake():
    with pytest.raises(AssertionError, match="logits"):
        make_loss("ce", COUNTS)(torch.zeros(2, 5), torch.zeros(2, 1))
