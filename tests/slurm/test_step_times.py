"""What a plan knows of a run: what the run itself has written."""

import json

import pytest

from livt_scale.slurm.step_times import Measured, measure
from tests.tiny_run import tiny_recipe, tiny_shards


def test_nothing_is_known_of_a_run_that_was_never_started_without_its_shards(tmp_path):
    assert measure(tiny_recipe(train="/nowhere"), "finetune", tmp_path) == Measured()


def test_the_number_of_steps_comes_from_the_manifest_before_the_first_start(tmp_path):
    tiny_shards(tmp_path, {"a": 20, "b": 13})
    recipe = tiny_recipe(train=tmp_path / "set")  # 20 epochs of 33 // 8 = 4 steps
    assert measure(recipe, "finetune", tmp_path / "run").total == 80


def test_step_and_save_are_as_the_run_wrote_them(tmp_path):
    folder = tmp_path / "finetune"
    folder.mkdir()
    status = {"state": "preempted", "step": 30, "total_steps": 100, "longest_save_s": 4.5}
    (folder / "status.json").write_text(json.dumps(status))
    steps = [9.0, 1.0, 1.2, 1.1, 3.0]  # the first is the slow one of a start
    lines = [json.dumps({"step": k, "step_s": s, "world_size": 4}) for k, s in enumerate(steps)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 5, "st']))  # a half line of a killed process
    known = measure(tiny_recipe(train="/nowhere"), "finetune", tmp_path)
    assert known == Measured(False, 30, 100, 1.15, 3.0, 4.5, 4)


def test_a_step_is_that_of_the_last_number_of_ranks_with_the_evaluations_and_saves_between(tmp_path):
    folder = tmp_path / "finetune"
    folder.mkdir()
    lines = [{"step": k, "step_s": 1.0, "world_size": 16} for k in range(30)]
    lines += [{"step": 30, "step_s": 9.0, "world_size": 8, "evaluation_s": 0.5}]  # the slow first one of a start
    lines += [
        {"step": 31 + k, "step_s": 2.0, "world_size": 8, "evaluation_s": 0.3 * k, "checkpoint_stall_s": 0.1}
        for k in range(3)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = measure(tiny_recipe(train="/nowhere"), "finetune", tmp_path)
    assert (known.step_s, known.longest_step_s, known.world_size) == (pytest.approx(2.4), 2.0, 8)
