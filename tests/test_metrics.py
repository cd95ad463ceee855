import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from livt_scale.metrics import MAX_CONFUSION_CLASSES, Tally

COUNTS = [500, 101, 100, 60, 20, 19, 3]  # many: 0, 1; medium: 2, 3, 4; few: 5, 6
THRESHOLDS = {"many_over": 100, "few_under": 20}


def outputs(size=400, num_classes=7, *, seed=0):
    """Logits and labels of a classifier that is right now and then, more so for the first classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (size,), generator=generator)
    logits = torch.randn(size, num_classes, generator=generator)
    logits[torch.arange(size), labels] += 2.5 - 0.3 * labels
    return logits, labels


def report(logits, labels, *, batches=1, counts=COUNTS):
    tally = Tally(len(counts))
    for part in torch.arange(len(labels)).tensor_split(batches):
        tally.update(logits[part], labels[part])
    return tally.report(counts, **THRESHOLDS)


def test_figures_equal_torchmetrics():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports warn about packages that are not installed
        from torchmetrics.functional import classification as peer
    logits, labels = outputs()
    found = report(logits, labels)
    kind = {"num_classes": 7}
    for k in (1, 5):
        mean = peer.multiclass_accuracy(logits, labels, top_k=k, average="micro", **kind)
        assert found[f"top{k}"]["all"] == pytest.approx(mean.item(), abs=1e-6)
        each = peer.multiclass_accuracy(logits, labels, top_k=k, average="none", **kind).tolist()
        assert [row[f"top{k}"] for row in found["per_class"]] == pytest.approx(each, abs=1e-6)
        assert found[f"top{k}"]["mean_class"] == pytest.approx(np.mean(each), abs=1e-6)
        groups = {"many": each[:2], "medium": each[2:5], "few": each[5:]}
        for name, rates in groups.items():
            assert found[f"top{k}"][name] == pytest.approx(np.mean(rates), abs=1e-6)
    confusion = peer.multiclass_confusion_matrix(logits, labels, **kind)
    assert found["confusion"] == confusion.tolist()
    error = peer.multiclass_calibration_error(logits.softmax(1), labels, n_bins=15, norm="l1", **kind)
    assert found["calibration"]["ece"] == pytest.approx(error.item(), abs=1e-6)


def test_calibration_bins_equal_a_reckoning_image_by_image():
    logits, labels = outputs(seed=3)
    found = report(logits, labels)["calibration"]
    shares = torch.softmax(logits.double(), 1).numpy()
    bins = [[] for _ in range(15)]
    for row, label in zip(shares, labels.tolist(), strict=True):
        k = next(k for k in range(15) if row.max() <= (k + 1) / 15)
        bins[k].append((row.max(), row.argmax() == label))
    error = 0.0
    for k, images in enumerate(bins):
        assert found["bins"][k]["images"] == len(images)
        if images:
            confidence, accuracy = np.mean(images, axis=0)
            assert found["bins"][k]["confidence"] == pytest.approx(confidence, abs=1e-6)
            assert found["bins"][k]["accuracy"] == pytest.approx(accuracy)
            error += len(images) / len(labels) * abs(confidence - accuracy)
    assert found["ece"] == pytest.approx(error, abs=1e-6)


def one_hot(classes, num_classes):
    return torch.nn.functional.one_hot(torch.as_tensor(classes), num_classes).float()


def test_pdc_is_0_where_classes_are_predicted_as_they_occur_and_1_where_as_they_were_trained():
    counts = [8, 4, 2, 2]
    labels = torch.arange(16) % 4
    as_trained = one_hot([0] * 8 + [1] * 4 + [2] * 2 + [3] * 2, 4)
    assert report(one_hot(labels.roll(1), 4), labels, counts=counts)["calibration"]["pdc"] == pytest.approx(0, abs=1e-9)
    assert report(as_trained, labels, counts=counts)["calibration"]["pdc"] == pytest.approx(1, abs=1e-9)
    assert report(as_trained, labels, counts=[5, 5, 5, 5])["calibration"]["pdc"] is None
    assert report(as_trained, labels, counts=[6, 6, 5, 5])["calibration"]["pdc"] is None, "as balanced as 22 can be"
    only_first = report(one_hot([0] * 16, 4), labels, counts=counts)["calibration"]["pdc"]
    assert 10 < only_first < 100  # finite, although three classes are never predicted


def test_pdc_equals_a_ratio_of_scipys_divergences():
    logits, labels = outputs(seed=5)
    occurs, predicted = (torch.bincount(each, minlength=7) for each in (labels, logits.argmax(1)))
    assert predicted.min() > 0
    expected = entropy(occurs, predicted) / entropy(occurs, COUNTS)
    assert report(logits, labels)["calibration"]["pdc"] == pytest.approx(expected, rel=1e-3)  # without the epsilon


@settings(max_examples=15, deadline=None)
@given(world=st.integers(1, 9), batches=st.integers(1, 4), seed=st.integers(0, 5))
def test_the_report_is_the_same_to_the_last_digit_however_images_are_spread(world, batches, seed):
    logits, labels = outputs(seed=seed)
    sums = []
    for rank in range(world):  # each image on one rank; some have more than others
        tally = Tally(7)
        mine = torch.arange(rank, len(labels), world)
        for part in mine.tensor_split(batches):
            tally.update(logits[part], labels[part])
        sums.append(tally.tensors())
    whole = Tally(7)
    for place, parts in zip(whole.tensors(), zip(*sums, strict=True), strict=True):
        place.copy_(torch.stack(parts).sum(0))  # what all_reduce does
    assert whole.report(COUNTS, **THRESHOLDS) == report(logits, labels)


def test_a_rank_without_images_adds_nothing():
    logits, labels = outputs()
    tally, empty = Tally(7), Tally(7)
    tally.update(logits, labels)
    empty.update(logits[:0], labels[:0])
    assert [t.shape for t in empty.tensors()] == [t.shape for t in tally.tensors()]
    assert not any(t.any() for t in empty.tensors())


def test_no_images_give_no_figures():
    found = Tally(7).report(COUNTS, **THRESHOLDS)
    assert found["num_samples"] == 0
    assert set(found["top1"].values()) == {None}
    assert found["calibration"]["ece"] is found["calibration"]["pdc"] is None


def test_a_group_without_classes_is_null_and_a_class_without_images_is_left_out():
    logits, labels = outputs()
    logits, labels = logits[labels != 6], labels[labels != 6]
    found = report(logits, labels)
    assert found["per_class"][6]["top1"] is None
    assert found["top1"]["few"] == found["per_class"][5]["top1"]
    found = report(logits, labels, counts=[500] * 7)
    assert found["top1"]["medium"] is None
    assert found["top1"]["few"] is None
    assert found["top1"]["many"] is not None


def test_each_row_says_its_class_group_and_images():
    rows = report(*outputs())["per_class"]
    assert [row["class"] for row in rows] == list(range(7))
    assert [row["group"] for row in rows] == ["many", "many", "medium", "medium", "medium", "few", "few"]
    assert [row["train_images"] for row in rows] == COUNTS
    assert sum(row["images"] for row in rows) == 400


@pytest.mark.parametrize("num_classes", [2, 4, 5, 6])
def test_top_5_of_five_classes_or_fewer_is_always_right(num_classes):
    logits, labels = outputs(num_classes=num_classes)
    rate = report(logits, labels, counts=[50] * num_classes)["top5"]["all"]
    assert (rate == 1) == (num_classes <= 5)


def test_ties_go_to_the_lower_class_and_agree_with_the_confusion():
    labels = torch.arange(7).repeat(3)
    found = report(torch.zeros(21, 7), labels)
    assert found["top1"]["all"] == pytest.approx(1 / 7)
    assert found["top5"]["all"] == pytest.approx(5 / 7)
    assert [row[0] for row in found["confusion"]] == [3] * 7


def test_a_logit_that_is_not_a_number_is_never_right():
    found = report(torch.full((7, 7), float("nan")), torch.arange(7))
    assert found["top1"]["all"] == found["top5"]["all"] == 0
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("num", [3, 5, 20])
def test_a_class_without_any_chance_is_not_among_the_first_five(num):
    logits = torch.full((num, num), -torch.inf)
    logits[:, -1] = 0.0  # as kNN gives them: every vote is for the last class
    tally = Tally(num)
    tally.update(logits, torch.arange(num))
    found = tally.report([9] * num, **THRESHOLDS)["per_class"]
    assert [row["class"] for row in found if row["top5"]] == [num - 1]
    assert [row["class"] for row in found if row["top1"]] == [num - 1]


def test_half_precision_logits_are_counted_as_they_are():
    logits, labels = outputs()
    assert report(logits.bfloat16(), labels) == report(logits.bfloat16().float(), labels)


def test_a_report_is_plain_json():
    found = report(*outputs())
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_many_classes_have_no_confusion_matrix():
    num_classes = MAX_CONFUSION_CLASSES + 1
    tally = Tally(num_classes)
    tally.update(torch.randn(4, num_classes), torch.tensor([0, 1, 999, 1000]))
    assert tally.report([30] * num_classes, **THRESHOLDS)["confusion"] is None
    assert tally.tensors()[0].numel() < 5 * num_classes
