"""metrics.jsonl of a run that was killed and continued holds what that of an unbroken run holds."""

from __future__ import annotations

import json

import pytest

from livt_scale.train.telemetry.clock import PARTS
from livt_scale.train.telemetry.layer_stats import NAMES
from livt_scale.train.telemetry.metrics_log import Telemetry, last_step_written, measured_demand
from livt_scale.train.telemetry.mfu import Speed

LOSSES = [0.1 * (k + 1) ** 0.5 for k in range(20)]
PART_S = dict(zip(PARTS, (0.0625, 0.0625, 0.015625, 0.03125, 0.0625, 0.5, 2.0), strict=True))  # sums are exact


class FixedClock:
    """Each step has the same parts."""

    steps = 0

    def take(self):
        taken, self.steps = {part: seconds * self.steps for part, seconds in PART_S.items()}, 0
        return taken


def record(folder, *, first: int, last: int, sums=None) -> dict[str, float]:
    with Telemetry(
        folder, label="pretrain", every_steps=4, total_steps=20, steps_per_epoch=10, global_batch=64,
        world_size=2, start_step=first, sums=sums, writes=True, speed=Speed(10**9, 0.5, 2),
    ) as telemetry:  # fmt: skip
        telemetry.clock = FixedClock()
        for done in range(first + 1, last + 1):
            telemetry.clock.steps += 1
            telemetry.step(done, loss=LOSSES[done - 1], grad_norm=1.0, lr=0.5, step_s=0.25, applied=done != 7)
        return telemetry.sums


def lines(folder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("saved_at", [1, 4, 6, 15])
def test_a_continued_record_equals_an_unbroken_one(tmp_path, saved_at):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    record(tmp_path / "a", first=0, last=20)
    sums = record(tmp_path / "b", first=0, last=saved_at)
    record(tmp_path / "b", first=saved_at, last=18, sums=sums)  # went on behind the checkpoint, then was killed
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    record(tmp_path / "b", first=saved_at, last=20, sums=sums)
    assert timeless(lines(tmp_path / "a")) == timeless(lines(tmp_path / "b"))


def timeless(records):
    """All but the process's own memory, which two processes do not share."""
    return [{k: v for k, v in line.items() if k != "memory_peak_gib"} for line in records]


def test_a_line_has_the_names_that_scripts_rely_on(tmp_path):
    record(tmp_path, first=0, last=20)
    first = lines(tmp_path)[0]
    assert first["step"] == 4
    assert first["epoch"] == 0.4
    assert first["loss"] == pytest.approx(sum(LOSSES[:4]) / 4)
    assert first["images_per_s"] == 256
    assert first["world_size"] == 2
    assert first["data_wait_s"] == 0.0625
    assert {"lr", "step_s", "memory_peak_gib"} <= first.keys()
    assert measured_demand(tmp_path) == pytest.approx(256 / 2 / (1 - 0.0625 / 0.25))


def test_the_parts_of_a_step_and_what_is_left_make_the_step(tmp_path):
    record(tmp_path, first=0, last=20)
    for line in lines(tmp_path):
        parts = ("data_wait_s", "forward_s", "backward_s", "agree_s", "optimizer_s", "other_s")
        assert sum(line[p] for p in parts) == pytest.approx(line["step_s"])
        assert line["checkpoint_stall_s"] == 0.5  # between steps, so no part of one
        assert line["evaluation_s"] == 2.0


def test_mfu_is_the_formula_over_the_peak_and_null_without_one(tmp_path):
    record(tmp_path, first=0, last=20)
    line = lines(tmp_path)[0]
    assert line["tflops"] == pytest.approx(0.128)  # 256 images/s of 1 GFLOP on 2 ranks
    assert line["mfu"] == pytest.approx(0.256)
    assert Speed(10**9, None, 2).figures(256.0) == {"tflops": 0.128, "mfu": None}


def test_a_step_that_was_not_taken_is_counted_and_in_no_mean(tmp_path):
    record(tmp_path, first=0, last=20)
    second = lines(tmp_path)[1]
    assert second["skipped_steps"] == 1
    assert second["loss"] == pytest.approx((LOSSES[4] + LOSSES[5] + LOSSES[7]) / 3)
    assert [line["skipped_steps"] for line in lines(tmp_path)] == [0, 1, 0, 0, 0]


def test_an_interval_without_a_step_taken_has_no_loss_and_is_json(tmp_path, capsys):
    with Telemetry(
        tmp_path, label="x", every_steps=1, total_steps=1, steps_per_epoch=1, global_batch=4, world_size=1,
        start_step=0, sums=None, writes=True,
    ) as telemetry:  # fmt: skip
        telemetry.step(1, loss=float("nan"), grad_norm=float("inf"), lr=0.1, step_s=0.1, applied=False)
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert "1 steps skipped" in capsys.readouterr().err


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with Telemetry(
        tmp_path, label="x", every_steps=1, total_steps=3, steps_per_epoch=3, global_batch=4, world_size=1,
        start_step=0, sums=None, writes=False,
    ) as telemetry:  # fmt: skip
        telemetry._writes, telemetry._file = True, (tmp_path / "metrics.jsonl").open("a")
        for done in (1, 2, 3):
            telemetry.step(done, loss=1.0, grad_norm=1.0, lr=0.1, step_s=0.1)
    assert capsys.readouterr().err.count("No space left on device; training goes on, lines are missing") == 1


def test_where_an_earlier_start_stopped_writing(tmp_path):
    assert last_step_written(tmp_path) == 0
    record(tmp_path, first=0, last=18)
    assert last_step_written(tmp_path) == 16
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 18, "lo')
    assert last_step_written(tmp_path) == 16


class FakeLayers:
    def before(self, *, scale):
        self.scale = scale

    def after(self):
        return {"head": dict.fromkeys(NAMES, 0.5), "embed": {**dict.fromkeys(NAMES, 0.5), "grad_norm": float("inf")}}


def test_layer_groups_are_asked_at_the_steps_of_a_line_alone(tmp_path):
    layers = FakeLayers()
    with Telemetry(
        tmp_path, label="x", every_steps=2, total_steps=4, steps_per_epoch=4, global_batch=4, world_size=1,
        start_step=0, sums=None, writes=True, layers=layers,
    ) as telemetry:  # fmt: skip
        for done in (1, 2, 3):
            telemetry.before_update(done, loss_scale=float(done))
            telemetry.step(done, loss=1.0, grad_norm=1.0, lr=0.1, step_s=0.1)
    assert layers.scale == 2.0
    (line,) = lines(tmp_path)
    assert line["layers"]["head"] == {"grad_norm": 0.5, "weight_norm": 0.5, "update_ratio": 0.5}
    assert line["layers"]["embed"]["grad_norm"] is None
