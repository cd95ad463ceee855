"""The per-class table, against a plain loop, and the pictures at every number of classes."""

from __future__ import annotations

import csv
import io
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from livt_scale.evaluation import plots
from livt_scale.evaluation.logits import Outputs
from livt_scale.evaluation.per_class import ClassRow, class_rows, write_csv
from livt_scale.evaluation.report import make_report, write_reports
from tests.evaluation.made import COUNTS, NAMES, outputs


def test_rows_equal_a_plain_loop() -> None:
    made = outputs(300, seed=4)
    z, labels = made.logits.double().numpy(), made.labels.tolist()
    given = [int(np.flatnonzero(row == row.max())[0]) for row in z]
    for c, row in enumerate(class_rows(made)):
        mine = [i for i, label in enumerate(labels) if label == c]
        hits = [i for i in mine if given[i] == c]
        assert (row.number, row.name, row.train_images, row.images) == (c, NAMES[c], COUNTS[c], len(mine))
        assert row.group == ["many", "many", "medium", "few", "few"][c]
        assert row.top1 == row.recall == pytest.approx(len(hits) / len(mine))
        assert row.precision == pytest.approx(len(hits) / given.count(c))
        sure = [math.exp(z[i].max()) / np.exp(z[i]).sum() for i in mine]
        assert row.mean_confidence == pytest.approx(np.mean(sure))
        wrong = [given[i] for i in mine if given[i] != c]
        most = max(range(5), key=lambda k: (wrong.count(k), -k))
        assert (row.confused_with, row.confused_with_name) == (most, NAMES[most])
        assert row.confused_share == pytest.approx(wrong.count(most) / len(mine))
        assert row.top5 == 1.0


def test_they_are_the_numbers_of_the_report() -> None:
    made = outputs(500, counts=tuple(range(300, 0, -25)))
    for row, told in zip(class_rows(made), made.report()["per_class"], strict=True):
        assert (row.group, row.images, row.top1, row.top5) == tuple(
            told[k] for k in ("group", "images", "top1", "top5")
        )


def test_what_cannot_be_told_is_empty_not_zero(tmp_path: Path) -> None:
    made = outputs(4, counts=(5, 5, 5))
    logits = torch.tensor([[9.0, 0, 0], [9.0, 0, 0], [0.0, 0, 0], [9.0, 0, 0]])
    made = Outputs(logits, torch.tensor([0, 0, 0, 1]), made.keys, made.about)
    first, second, third = class_rows(made)
    assert (first.top1, first.precision, first.confused_with) == (1.0, 0.75, None)  # of equal logits the lower number
    assert (second.top1, second.precision, second.confused_with, second.confused_share) == (0.0, None, 0, 1.0)
    assert (third.images, third.top1, third.precision, third.mean_confidence) == (0, None, None, None)
    write_csv([third], tmp_path / "rows.csv")
    (row,) = csv.DictReader(io.StringIO((tmp_path / "rows.csv").read_bytes().decode(), newline=""))
    assert {k for k, v in row.items() if v == ""} >= {"top1", "precision", "recall", "mean_confidence", "confused_with"}


def test_the_csv_keeps_hostile_names_whole(tmp_path: Path) -> None:
    rows = class_rows(outputs(300))
    path = tmp_path / "a folder" / "per_class.csv"
    write_csv(rows, path)
    read = list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))
    assert [row["name"] for row in read] == list(NAMES)
    assert [int(row["class"]) for row in read] == [0, 1, 2, 3, 4]
    assert [float(row["recall"]) for row in read] == pytest.approx([row.recall for row in rows], abs=1e-6)


@pytest.mark.parametrize("num_classes", [1, 2, 20, 21, 365, 8142])
def test_the_class_picture_holds_any_number_of_classes(tmp_path: Path, num_classes: int) -> None:
    rng = np.random.default_rng(0)
    rows = [
        ClassRow(c, f"c{c}", "many", int(n), 5, None if c == 1 else float(a), 1.0, 1.0, 1.0, 0.5, None, None, None)
        for c, (n, a) in enumerate(zip(rng.integers(0, 2000, num_classes), rng.random(num_classes), strict=True))
    ]
    started = time.perf_counter()
    plots.classes_by_frequency(rows, tmp_path / "a.png")
    assert time.perf_counter() - started < 20
    plots.classes_by_frequency(rows[::-1], tmp_path / "b.png")  # sorted by frequency, not by the order given
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] < 1200


def test_a_bar_is_as_high_as_its_accuracy() -> None:
    rows = [
        ClassRow(c, f"c{c}", "many", n, 4, a, 1.0, 1.0, a, 0.5, None, None, None)
        for c, (n, a) in enumerate([(10, 0.25), (1000, 1.0), (100, 0.0)])
    ]
    axes = Figure().subplots()
    plots.draw_classes(axes, rows)
    (bars,) = axes.containers
    assert [bar.get_height() for bar in bars] == [0.25, 1.0, 0.0]
    assert [bar.get_center()[0] for bar in bars] == pytest.approx([0, 1, 2])


def test_reliability_bars_are_accuracies_and_marks_confidences() -> None:
    bins = [
        {"from": k / 15, "to": (k + 1) / 15, "images": 10 * (k == 7), "accuracy": 0.25, "confidence": 0.5}
        for k in range(15)
    ]
    upper, lower = Figure().subplots(2)
    plots.draw_reliability(upper, lower, "only", {"ece": 0.25, "bins": bins})
    (bar,), (share,) = upper.patches, lower.patches  # no bars for bins without images
    assert (bar.get_x(), bar.get_width(), bar.get_height()) == pytest.approx((7 / 15, 1 / 15, 0.25))
    assert share.get_height() == 1.0
    (mark,) = upper.collections[0].get_segments()
    assert mark.tolist() == [[pytest.approx(7 / 15), 0.5], [pytest.approx(8 / 15), 0.5]]


def test_all_files_of_a_report_are_written_and_the_same_each_time(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        written = write_reports(make_report(outputs(200), tau="auto", temperature=True), folder)
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in written)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
