"""The order of a stage comes from recipe and shards alone, and counting a stage's steps needs no torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Pretrain
from livt_scale.data.order.class_balanced import ClassOrder, Repeated
from livt_scale.data.order.for_stage import order_for, planned_steps, stage_order
from livt_scale.data.order.instance import Order
from livt_scale.util.errors import DataError
from tests.data import tiny_sets
from tests.data.tiny_sets import tiny_set
from tests.test_architecture import ROOT
from tests.tiny_run import tiny_recipe, tiny_shards

QUICKSTART = ROOT / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"


def test_the_quickstart_has_the_steps_of_its_run():
    assert planned_steps(load_recipe(QUICKSTART), "pretrain") == 80 * 38


def test_planned_steps_are_epochs_times_the_steps_of_the_order(tmp_path):
    shards = tiny_shards(tmp_path, {"a": 20, "b": 13})
    recipe = tiny_recipe(train=tmp_path / "set")
    assert planned_steps(recipe, "finetune") == 20 * stage_order(shards, recipe, "finetune").steps_per_epoch == 80


def test_without_shards_the_number_of_steps_is_unknown():
    assert planned_steps(tiny_recipe(train="/nowhere"), "finetune") is None


def test_counting_steps_needs_no_torch():
    code = (
        "import sys\n"
        "from livt_scale.config.load import load_recipe\n"
        "from livt_scale.data.order.for_stage import planned_steps\n"
        f"assert planned_steps(load_recipe({str(QUICKSTART)!r}), 'finetune')\n"
        "assert 'torch' not in sys.modules and 'fsspec' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("sampling", "repeats", "kind"),
    [("instance", 1, Order), ("class_balanced", 1, ClassOrder), ("sqrt", 1, ClassOrder), ("instance", 3, Repeated)],
)
def test_the_policy_and_the_repeats_decide_the_kind_of_order(sampling, repeats, kind):
    part = Pretrain(
        epochs=2, warmup_epochs=0, global_batch=12, micro_batch=2, repeats=repeats, sampling={"policy": sampling}
    )
    order = order_for(part, [100], lambda: np.arange(100) % 3, seed=0)
    assert type(order) is kind
    assert (order.global_batch, order.steps_per_epoch) == (12, 8)


def test_lane_groups_must_divide_the_samples_of_a_batch_with_repeats():
    part = Pretrain(epochs=2, warmup_epochs=0, global_batch=12, micro_batch=2, repeats=3)
    with pytest.raises(DataError, match=r"lane_groups is 6 and does not divide the 4 samples .* 3 views"):
        order_for(part, [100], lambda: np.zeros(100), seed=0, lane_groups=6)
    assert isinstance(order_for(part, [100], lambda: np.zeros(100), seed=0, lane_groups=4), Repeated)


def test_seed_batch_and_lane_groups_come_from_the_recipe(tmp_path):
    shards = tiny_set(tmp_path / "set")
    recipe = tiny_sets.tiny_recipe(shards.folder, seed=9, data__lane_groups=2)
    order = stage_order(shards, recipe, "finetune")
    assert (order.seed, order.global_batch, order.lane_groups) == (9, 8, 2)
