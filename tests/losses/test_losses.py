"""Losses against a reckoning in float64 that sums over samples and classes one by one, by the papers' formulas."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from livt_scale.losses import LOSSES, LossOptions, formulas, make, make_loss
from livt_scale.losses.formulas import soft_targets
from livt_scale.util.errors import DataError, UsageError
from tests import pretend_cuda

COUNTS = (500, 120, 60, 9, 1)


def options_of(name):
    return [option for option in LOSSES[name].model_fields if option != "name"]


NEEDS_LABELS = {"lade"}  # takes one-hot targets alone
# What each takes, far from its defaults.
OTHERWISE = {
    "ce": {},
    "ls_ce": {"smoothing": 0.4},
    "bce": {},
    "bal_ce": {"tau": 1.7},
    "bal_bce": {"tau": 0.6},
    "cb_ce": {"beta": 0.99},
    "cb_bce": {"beta": 0.99},
    "ldam": {"max_margin": 1.5, "scale": 3.0},
    "mislas": {"head_smoothing": 0.6, "tail_smoothing": 0.05},
    "lade": {"dv_weight": 2.0, "dv_penalty": 0.7},
    "focal": {"gamma": 0.7},
}
USUAL_AND_NOT = [(name, options) for name in sorted(LOSSES) for options in ({}, OTHERWISE[name])]


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


def published(name, z, t, counts, **options):
    """The loss by the formula of its paper, for labels, one image at a time; a soft target is the mean over labels.

    `options` stand beside the papers' constants, which are written out here once more.
    """
    defaults = {
        "tau": 1, "smoothing": 0.1, "beta": 0.9999, "max_margin": 0.5, "scale": 30, "head_smoothing": 0.3,
        "tail_smoothing": 0, "dv_weight": 0.1, "dv_penalty": 0.1, "gamma": 2,
    }  # fmt: skip
    o = defaults | options
    classes, total = range(len(counts)), sum(counts)
    prior = [n / total for n in counts]

    def nll(row, y):
        top = max(row)
        return top + math.log(sum(math.exp(x - top) for x in row)) - row[y]

    def smoothed(row, y, epsilon):
        return (1 - epsilon) * nll(row, y) + epsilon * sum(nll(row, c) for c in classes) / len(classes)

    def of_label(row, y):
        weights = [(1 - o["beta"]) / (1 - o["beta"] ** n) for n in counts]
        weights = [len(counts) * w / sum(weights) for w in weights]
        if name in ("bce", "bal_bce", "cb_bce", "focal"):
            value = 0.0
            for c in classes:
                x = row[c] + (o["tau"] * math.log(prior[c] / (1 - prior[c])) if name == "bal_bce" else 0)
                p = 1 / (1 + math.exp(-x))
                right = p if c == y else 1 - p
                value -= math.log(right) * {"focal": (1 - right) ** o["gamma"], "cb_bce": weights[c]}.get(name, 1)
            return value
        if name in ("bal_ce", "lade"):
            tau = o["tau"] if name == "bal_ce" else 1
            return nll([x + tau * math.log(p) for x, p in zip(row, prior, strict=True)], y)
        if name == "ls_ce":
            return smoothed(row, y, o["smoothing"])
        if name == "mislas":
            few, most = min(counts), max(counts)
            sine = math.sin((counts[y] - few) * math.pi / (2 * (most - few)))
            return smoothed(row, y, o["tail_smoothing"] + (o["head_smoothing"] - o["tail_smoothing"]) * sine)
        if name == "cb_ce":
            return weights[y] * nll(row, y)
        if name == "ldam":
            margins = [n**-0.25 for n in counts]
            margin = margins[y] * o["max_margin"] / max(margins)
            return nll([o["scale"] * (x - (margin if c == y else 0)) for c, x in enumerate(row)], y)
        assert name == "ce"
        return nll(row, y)

    value = sum(t[b, y] * of_label(z[b], y) for b in range(len(z)) for y in classes if t[b, y]) / len(z)
    if name == "lade":
        for c in classes:
            mine = [z[b, c] for b in range(len(z)) if t[b, c] == 1]
            first = sum(mine) / len(mine) if mine else 0.0
            uniform = math.log(1 / len(counts))
            second = math.log(sum(math.exp(z[b, c] - math.log(prior[c]) + uniform) for b in range(len(z))) / len(z))
            value -= o["dv_weight"] * prior[c] * (first - second - o["dv_penalty"] * second**2)
    return value


def batch(seed=0, size=6, *, num_classes=5, smoothing=0.1, mixed=True):
    random = np.random.default_rng(seed)
    z = 3 * random.standard_normal((size, num_classes))
    t = soft_targets(torch.from_numpy(random.integers(num_classes, size=size)), num_classes, smoothing).double()
    if mixed:  # as mixup leaves them
        t = 0.3 * t + 0.7 * t.flip(0)
    return z, (t / t.sum(dim=1, keepdim=True)).numpy()  # to 1 in float64 too


def fitting_batch(name, *, hard=False, **how):
    """(logits, targets) that the loss of that name takes."""
    return batch(**how, **({"smoothing": 0.0, "mixed": False} if hard or name in NEEDS_LABELS else {}))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("name", "options"), USUAL_AND_NOT)
def test_a_loss_is_what_its_paper_says(name, options, hard):
    z, t = fitting_batch(name, hard=hard)
    value = make_loss(name, COUNTS, **options)(torch.from_numpy(z), torch.from_numpy(t))
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(published(name, z, t, COUNTS, **options), rel=1e-12)


@pytest.mark.parametrize("rows_at_once", [1, 2, 100])  # of 6: one, several groups of equal size, all; 4 and 2
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("name", "options"), USUAL_AND_NOT)
def test_the_gradient_is_that_of_the_value(name, options, hard, rows_at_once, monkeypatch):
    monkeypatch.setitem(formulas.GROUP_ELEMENTS, "cpu", rows_at_once * len(COUNTS))
    z, t = (torch.from_numpy(x) for x in fitting_batch(name, hard=hard))
    loss = make_loss(name, COUNTS, **options)
    assert torch.autograd.gradcheck(lambda x: loss(x, t), z.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: loss(30 * x, t), z, atol=1e-4)  # where exp() of the logits is large


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1p_is_exact_to_two_units_in_the_last_place(dtype):
    u = torch.exp(-torch.linspace(0, 80, 100_001, dtype=torch.float64)).to(dtype)
    expected = torch.log1p(u.double())
    apart = ((formulas._log1p(u.clone()).double() - expected) / expected).abs().max().item()
    assert apart < 2 * torch.finfo(dtype).eps
    assert formulas._log1p(torch.tensor([0.0, math.nan], dtype=dtype)).tolist() == [
        0.0,
        pytest.approx(math.nan, nan_ok=True),
    ]


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("rows_at_once", [1, 4, 6])
def test_how_rows_are_grouped_changes_rounding_alone(name, rows_at_once, monkeypatch):
    z, t = (torch.from_numpy(x) for x in fitting_batch(name))
    found = []
    for rows in (1000, rows_at_once):
        monkeypatch.setitem(formulas.GROUP_ELEMENTS, "cpu", rows * len(COUNTS))
        logits = z.clone().requires_grad_()
        value = make_loss(name, COUNTS)(logits, t)
        value.backward()
        found.append((value.detach(), logits.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - NEEDS_LABELS))
def test_a_soft_target_costs_the_mean_over_the_classes_that_it_may_be(name):
    z, one = (torch.from_numpy(x) for x in batch(mixed=False, smoothing=0.2))
    other, loss = one.roll(1, dims=1), make_loss(name, COUNTS)
    mixed = loss(z, 0.3 * one + 0.7 * other).item()
    assert mixed == pytest.approx(0.3 * loss(z, one).item() + 0.7 * loss(z, other).item(), rel=1e-12)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - NEEDS_LABELS))
def test_the_order_of_images_and_of_classes_means_nothing(name):
    z, t = (torch.from_numpy(x) for x in batch())
    value, turn = make_loss(name, COUNTS)(z, t).item(), [3, 0, 4, 1, 2]
    counts = np.array(COUNTS)[turn]
    assert make_loss(name, counts)(z.flip(0)[:, turn], t.flip(0)[:, turn]).item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, options in OTHERWISE.items() for o in options.items()])
def test_every_option_changes_the_loss(name, options):
    z, t = (torch.from_numpy(x) for x in fitting_batch(name))
    option, value = options
    assert make_loss(name, COUNTS, **{option: value})(z, t) != make_loss(name, COUNTS)(z, t)


def test_smoothing_is_the_same_in_the_targets_and_in_the_loss():
    """Also under mixup, which mixes what is smoothed."""
    smooth, plain = batch(smoothing=0.1), batch(smoothing=0.0)
    in_targets, in_loss = make_loss("ce", COUNTS), make_loss("ls_ce", COUNTS)
    assert in_targets(*map(torch.from_numpy, smooth)).item() == pytest.approx(
        in_loss(*map(torch.from_numpy, plain)).item(), rel=1e-6
    )


@pytest.mark.parametrize(
    ("name", "options", "plain"),
    [
        ("ls_ce", {"smoothing": 0}, "ce"),
        ("bal_ce", {"tau": 0}, "ce"),
        ("bal_bce", {"tau": 0}, "bce"),
        ("cb_ce", {"beta": 0}, "ce"),
        ("cb_bce", {"beta": 0}, "bce"),
        ("ldam", {"max_margin": 0, "scale": 1}, "ce"),
        ("mislas", {"head_smoothing": 0}, "ce"),
        ("lade", {"dv_weight": 0}, "bal_ce"),
        ("focal", {"gamma": 0}, "bce"),
    ],
)
def test_without_its_strength_a_loss_is_a_plainer_one(name, options, plain):
    z, t = (torch.from_numpy(x) for x in fitting_batch(name))
    value = make_loss(name, COUNTS, **options)(z, t).item()
    assert value == pytest.approx(make_loss(plain, COUNTS)(z, t).item(), rel=1e-12)


def test_lade_refuses_targets_that_are_no_labels():
    loss, z = make_loss("lade", COUNTS), torch.zeros(2, 5)
    for targets in (torch.full((2, 5), 0.2), torch.tensor([[1.0, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0]])):
        with pytest.raises(UsageError, match="Switch mixup, cutmix and smoothing off"):
            loss(z, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by", [1.0, 20.0, 1000.0])
def test_ldam_keeps_its_margin_where_the_model_is_sure(dtype, by):
    """The true class ahead by its margin m: p = 1/2 of it. In 1 - p all of exp(-s·m) would be lost."""
    scale, margin = 30.0, 0.5
    z = torch.tensor([[margin * by, 0.0]], dtype=dtype)
    value = make_loss("ldam", (7, 7), max_margin=margin, scale=scale)(z, torch.tensor([[1.0, 0.0]], dtype=dtype))
    expected = math.log1p(math.exp(-scale * margin * (by - 1)))
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-30)


def test_mislas_smooths_the_largest_class_most_and_equal_classes_not_at_all():
    smoothing = make_loss("mislas", (101, 51, 1)).by_class.tolist()
    assert smoothing == pytest.approx([0.3, 0.3 * math.sin(math.pi / 4), 0])
    z, t = (torch.from_numpy(x) for x in batch())
    assert make_loss("mislas", [7] * 5)(z, t) == make_loss("ls_ce", [7] * 5, smoothing=0)(z, t)


def test_weights_of_cb_ce_have_mean_one_and_fall_to_the_inverse_of_the_counts():
    weights = make_loss("cb_ce", (10**8, 10, 1), beta=0.999999999999).by_class
    assert weights.mean().item() == pytest.approx(1)
    assert (weights[2] / weights[1]).item() == pytest.approx(10, rel=1e-6)
    assert (weights[2] / weights[0]).item() == pytest.approx(10**8, rel=1e-3)


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


def test_the_margin_of_two_classes_is_the_log_of_their_odds():
    margin = make_loss("bal_bce", (90, 10)).by_class
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
    z, t = fitting_batch(name, num_classes=len(counts))
    logits = (torch.from_numpy(z) / np.abs(z).max() * scale).to(dtype).requires_grad_()
    value = make_loss(name, counts)(logits, torch.from_numpy(t).float())
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("counts", [(10**8, 1), (1, 10**8), (10**15, 1)])
def test_a_class_of_one_image_among_a_hundred_millions_keeps_its_margin(counts):
    margin = make_loss("bal_bce", counts).by_class
    ratio = math.log(counts[0] / counts[1])
    np.testing.assert_allclose(margin, [ratio, -ratio], rtol=1e-14)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_half_precision_logits_are_reckoned_in_float32(name):
    z, t = fitting_batch(name)
    half = torch.tensor(z, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        value = make_loss(name, COUNTS)(half, torch.from_numpy(t).float())
    expected = published(name, half.double().numpy(), t, COUNTS)
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
    with pytest.raises(DataError, match="one number per class"):
        make_loss("ce", counts)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_single_class_is_a_loss_or_an_error_that_says_so(name):
    if name in ("bal_bce", "ldam"):
        with pytest.raises(DataError, match="single class"):
            make_loss(name, [30])
        return
    z = torch.ones(2, 1, requires_grad=True)
    value = make_loss(name, [30])(z, torch.ones(2, 1))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(z.grad).all()


def test_an_unknown_loss_gets_the_nearest_name():
    with pytest.raises(UsageError, match="Did you mean 'bal_bce'"):
        make_loss("balbce", COUNTS)


def test_an_option_that_has_no_effect_is_refused():
    with pytest.raises(UsageError, match="'ce' does not take 'tau'"):
        make_loss("ce", COUNTS, tau=1.0)
    with pytest.raises(UsageError, match="has the options tau: leave it out, or take focal"):
        make_loss("bal_ce", COUNTS, gamma=2)
    make_loss("ce", COUNTS, tau=None)  # None: not given


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize(("name", "option"), [(n, option) for n in sorted(LOSSES) for option in options_of(n)])
def test_an_impossible_value_is_refused(name, option, value):
    with pytest.raises(UsageError, match=f"{option} is {value}"):
        make_loss(name, COUNTS, **{option: value})


@pytest.mark.parametrize("option", ["smoothing", "beta", "head_smoothing", "tail_smoothing"])
def test_a_share_is_less_than_one(option):
    name = next(name for name in LOSSES if option in options_of(name))
    with pytest.raises(UsageError, match=f"{option} is 1.0.*less than 1"):
        make_loss(name, COUNTS, **{option: 1.0})


def test_logits_are_not_multiplied_by_nothing():
    with pytest.raises(UsageError, match="scale is 0"):
        make_loss("ldam", COUNTS, scale=0)


def test_smoothed_targets_are_as_published_and_sum_to_one():
    targets = soft_targets(torch.tensor([2, 0]), 4, 0.1)
    assert targets.dtype == torch.float32
    expected = [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]
    np.testing.assert_allclose(targets, expected, rtol=1e-6)
    assert soft_targets(torch.tensor([1]), 3, 0.0).tolist() == [[0.0, 1.0, 0.0]]


def test_every_option_has_a_default_and_says_where_it_is_from():
    for name in LOSSES:
        for option in options_of(name):
            field = LOSSES[name].model_fields[option]
            assert isinstance(field.default, float)
            assert "(default: " in field.description


def test_a_loss_is_called_the_same_in_the_registry_and_in_a_recipe():
    assert {name: LOSSES[name]().name for name in LOSSES} == {name: name for name in LOSSES}


@pytest.mark.parametrize(
    ("logits", "targets"),
    [
        (torch.zeros(2, 5), torch.zeros(2, 1)),
        (torch.zeros(2, 4), torch.zeros(2, 4)),  # other classes than the loss has
        (torch.zeros(5), torch.zeros(5)),
        (torch.zeros(2, 5), torch.zeros(2)),
        (torch.zeros(2, 5), torch.tensor([1, 2, 3])),
        (torch.zeros(2, 5), torch.tensor([0, 5])),
        (torch.zeros(2, 5), torch.tensor([-1, 0])),
    ],
)
def test_shapes_and_labels_that_do_not_fit_are_wrong_usage(logits, targets):
    with pytest.raises(UsageError, match=r"^(logits|labels) are"):
        make("bal_bce", COUNTS)(logits, targets)


@pytest.mark.parametrize("name", list(LOSSES))
def test_labels_are_one_hot_targets_and_the_module_has_nothing_to_train(name):
    loss, labels = make(name, COUNTS), torch.tensor([4, 0, 1])
    z = torch.randn(3, len(COUNTS), generator=torch.Generator().manual_seed(0))
    assert isinstance(loss, torch.nn.Module)
    assert list(loss.parameters()) == []
    assert loss(z, labels) == make_loss(name, COUNTS)(z, torch.eye(len(COUNTS))[labels])
    half = copy.deepcopy(loss).half()  # as a part of a model in half precision: its numbers stay float64
    assert half(z, labels) == loss(z, labels)


def test_a_loss_from_outside_the_package_takes_labels_too():
    class Plain(LossOptions):
        name: str = "plain"

        def build(self, counts):
            return lambda logits, targets: (logits.softmax(1) * targets).sum()

    LOSSES.register("plain", Plain)
    try:
        loss, z = make("plain", COUNTS), torch.zeros(2, 5)
        assert loss(z, torch.tensor([0, 4])) == loss(z, torch.eye(5)[[0, 4]])
        with pytest.raises(UsageError, match=r"targets \["):
            loss(z, torch.zeros(2, 4))
    finally:
        LOSSES.remove("plain")


def test_lade_reads_the_targets_of_a_gpu_once():
    form, log_prior = formulas.disentangled(0.1, 0.1), torch.full((3,), -math.log(3))
    logits, one_hot = torch.randn(4, 3), F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    pretend_cuda.waits.clear()
    for _ in range(3):
        on_gpu = form(*map(pretend_cuda.Gpu, (logits, one_hot, log_prior)))
    assert sum(pretend_cuda.waits.values()) == 1
    assert torch.equal(on_gpu.inner, form(logits, one_hot, log_prior))
    with pytest.raises(UsageError, match="soft targets"):
        formulas.disentangled(0.1, 0.1)(*map(pretend_cuda.Gpu, (logits, 0.9 * one_hot, log_prior)))
