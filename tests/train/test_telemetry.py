"""metrics.jsonl of a run that was killed and continued holds what that of an unbroken run holds."""

from __future__ import annotations

import json

import pytest

from livt_scale.train.telemetry import Telemetry

LOSSES = [0.1 * (k + 1) ** 0.5 for k in range(20)]


def record(folder, *, first: int, last: int, sums=None) -> dict[str, float]:
    with Telemetry(
        folder, label="pretrain", every_steps=4, total_steps=20, steps_per_epoch=10, global_batch=64,
        world_size=2, start_step=first, sums=sums, tensorboard=False, writes=True,
    ) as telemetry:  # fmt: skip
        for done in range(first + 1, last + 1):
            telemetry.step(done, loss=LOSSES[done - 1], grad_norm=1.0, lr=0.5, step_s=0.25, data_wait_s=0.05)
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
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_a_line_has_the_names_that_scripts_rely_on(tmp_path):
    record(tmp_path, first=0, last=20)
    first = lines(tmp_path)[0]
    assert first["step"] == 4
    assert first["epoch"] == 0.4
    assert first["loss"] == pytest.approx(sum(LOSSES[:4]) / 4)
    assert first["images_per_s"] == 256
    assert first["world_size"] == 2
    assert {"lr", "data_wait_s", "step_s"} <= first.keys()
