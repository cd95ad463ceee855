"""Published training times: the planner's range holds most of them, and the page has what the benchmark makes now."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def published_times():
    return load_script(ROOT / "benchmarks" / "published_times.py")


@pytest.fixture(scope="module")
def found(published_times):
    return published_times.rows()


def test_maes_four_times_are_within_25_per_cent_of_the_likely_value_by_the_same_constants(found):
    four = [row for row in found if row["run"].startswith("MAE ") and "probe" not in row["run"]]
    assert len(four) == 4
    assert all(0.75 <= row["ratio"] <= 1.25 for row in four)


def test_most_times_that_set_no_constant_are_in_the_range(published_times, found):
    facts = published_times.summary(found)
    assert facts["runs"] >= 10
    assert facts["unused"] >= facts["runs"] / 2
    assert facts["inside_unused"] >= 0.8
    assert all(row["low"] < row["likely"] < row["high"] and row["source"] for row in found)


def test_the_page_has_the_table_of_now(published_times, found):
    assert published_times.table(found) in (ROOT / "docs" / "plan.md").read_text()
