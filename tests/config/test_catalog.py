from pathlib import Path

import pytest

from livt_scale.config.catalog import page, rows
from livt_scale.util.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
SOURCED = ("base_lr", "layer_decay", "betas", "weight_decay", "smoothing", "warmup_epochs", "global_batch")


def test_the_page_is_what_the_recipes_make():
    assert (ROOT / "docs" / "recipes.md").read_text() == page(rows()), "livt recipe list --page docs/recipes.md"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.path)
def test_a_recipe_names_its_own_command(row):
    assert f"recipes/{row.path}" in row.command


@pytest.mark.parametrize("row", [row for row in rows() if "fashion" not in row.path], ids=lambda row: row.path)
def test_a_value_that_decides_what_is_learnt_says_whose_it_is(row):
    text = (ROOT / "recipes" / row.path).read_text()
    lines = [line for line in text.splitlines() if line.strip().split(":")[0] in SOURCED]
    assert all("#" in line for line in lines), [line for line in lines if "#" not in line]


@pytest.mark.parametrize("px", ["224", "384"])
def test_both_resolutions_of_the_papers_main_table_are_there(px):
    for group in ("imagenet_lt", "inat18"):
        assert any(row.path.startswith(group) and f"at {px} px, bal_bce" in row.stage("finetune") for row in rows())


def test_inaturalist_is_pretrained_at_128_px():
    (row,) = [row for row in rows() if row.path == "inat18/vit_b16.yaml"]
    assert row.stage("pretrain") == "800 × 4096 at 128 px"


def test_a_recipe_without_its_head_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("# Reproduces: nothing\nname: x\n")
    with pytest.raises(UsageError, match=r"mine\.yaml does not open with Hardware, Expect, Command"):
        rows(tmp_path)
