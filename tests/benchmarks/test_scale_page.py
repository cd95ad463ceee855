"""docs/scale.md is what its script makes of the planner now."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import load_script

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scale.md"
STALE = "python benchmarks/scale.py --page docs/scale.md"


@pytest.fixture(scope="module")
def scale():
    return load_script(ROOT / "benchmarks" / "scale.py")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are named from there, as in the commands of the page


@pytest.mark.slow
def test_the_head_and_a_table_of_the_page_are_made_now(scale):
    page = PAGE.read_text(encoding="utf-8")
    assert page.startswith(scale.head()), STALE
    assert scale.section("ViT-B/16", "finetune") in page, STALE


@pytest.mark.slow
def test_the_whole_page_is_made_now(scale):
    assert PAGE.read_text(encoding="utf-8") == scale.page(), STALE


def test_what_cannot_be_cut_is_said_and_what_does_not_fit_has_no_figure(scale, monkeypatch):
    *_, last = scale.stage_table("vit_b16", "finetune", [512, 1024, 2048])
    assert "1024 GPUs and more: no figure" in last
    monkeypatch.setattr(scale, "DEVICE", "t4 --set parallel.precision=fp16 --assume reserve_gib=8")
    rows = scale.stage_table("vit_h14", "pretrain", [1, 2, 8])[2:]
    assert rows[0].startswith("| 1 | nothing fits | - |")
    assert "| 100% |" in rows[1] + rows[2]  # against the smallest that fits
