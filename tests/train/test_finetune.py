"""Fine-tuning as a task: what is checked before its first step."""

from __future__ import annotations

import pytest

from livt_scale.distributed.world import World
from livt_scale.train.finetune import finetune_task
from tests.data.tiny_sets import tiny_recipe, tiny_set

WARNING = "finetune: data.val has the images of data.train: accuracy on others is not measured"


@pytest.mark.parametrize("same", [True, False])
def test_evaluation_on_the_training_set_is_a_warning(same, tmp_path, caplog):
    train, other = tiny_set(tmp_path / "train"), tiny_set(tmp_path / "val", num_samples=12)
    val = train if same else other
    recipe = tiny_recipe(train.folder, data__val=str(val.folder), stages__finetune__init="scratch", model__depth=1)
    task = finetune_task(recipe, train, run_dir=tmp_path, world=World())
    task.close()
    assert caplog.messages == ([WARNING] if same else [])
