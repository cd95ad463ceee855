"""metrics.jsonl of a run that was killed and resumed equals that of an uninterrupted run."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from livt_scale.distributed.world import World
from livt_scale.train.telemetry.clock import PARTS
from livt_scale.train.telemetry.metrics_log import MetricsLog, last_step_written, measured_demand
from livt_scale.train.telemetry.mfu import Speed
from tests.train.disks import full_disk
from tests.train.loops import a_step, idle_loop, started, take

LOSSES = [0.1 * (k + 1) ** 0.5 for k in range(20)]
PART_S = dict(zip(PARTS, (0.0625, 0.0625, 0.015625, 0.03125, 0.0625, 0.5, 2.0), strict=True))  # sums are exact


class FixedClock:
    """Each step has the same parts."""

    steps = 0

    def take(self):
        taken, self.steps = {part: seconds * self.steps for part, seconds in PART_S.items()}, 0
        return taken


def record(folder, *, first: int, last: int, sums=None) -> dict[str, float]:
    log = MetricsLog(folder, speed=Speed(10**9, 0.5, 2))
    loop = idle_loop(log, log_every=4, world=World(0, 2), start=first)
    loop.state.sums, loop.clock = sums, FixedClock()
    with started(loop):
        for done in range(first + 1, last + 1):
            loop.clock.steps += 1
            take(loop, a_step(done, loss=LOSSES[done - 1], applied=done != 7))
        return log.sums


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
    """All but the clock and the process's own memory, which two processes do not share."""
    return [{k: v for k, v in line.items() if k not in ("memory_peak_gib", "time")} for line in records]


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
    at = datetime.fromisoformat(first["time"])
    assert at.utcoffset() == timedelta(0)
    assert abs((datetime.now(UTC) - at).total_seconds()) < 60
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


def test_an_interval_without_a_step_taken_has_no_loss_and_is_json(tmp_path, caplog):
    caplog.set_level("INFO")
    with started(idle_loop(MetricsLog(tmp_path), total=1, epoch=1)) as loop:
        take(loop, a_step(1, loss=float("nan"), grad_norm=float("inf"), applied=False))
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert "1 steps skipped" in caplog.text


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, caplog):
    with started(idle_loop(MetricsLog(tmp_path), total=3, epoch=3)) as loop:
        with full_disk():
            take(loop, a_step(1))
            take(loop, a_step(2))
        take(loop, a_step(3))
    assert [line["step"] for line in lines(tmp_path)][-1] == 3
    assert caplog.text.count("File too large; training continues, lines are missing") == 1


def test_where_an_earlier_start_stopped_writing(tmp_path):
    assert last_step_written(tmp_path) == 0
    record(tmp_path, first=0, last=18)
    assert last_step_written(tmp_path) == 16
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 18, "lo')
    assert last_step_written(tmp_path) == 16


def test_what_a_hook_adds_to_a_step_is_in_its_line(tmp_path):
    with started(idle_loop(MetricsLog(tmp_path), total=4, epoch=4, log_every=2)) as loop:
        for done in (1, 2, 3):
            take(loop, a_step(done, metrics={"layers": {"head": done}}))
    (line,) = lines(tmp_path)
    assert line["layers"] == {"head": 2}
    assert list(line)[-1] == "layers"
