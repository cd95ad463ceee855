"""What the step took from its loader is known from the part of the run before, if there was one."""

from __future__ import annotations

import json

import pytest

from livt_scale.train.telemetry.metrics_log import Telemetry, measured_demand


def test_demand_is_what_the_steps_would_take_without_waiting(tmp_path):
    lines = [
        {"step": 1, "images_per_s": 1.0, "step_s": 1, "data_wait_s": 0, "world_size": 1},
        {"step": 2, "images_per_s": 800.0, "step_s": 2.0, "data_wait_s": 1.0, "world_size": 4},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured_demand(tmp_path) == pytest.approx(400)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_rank_s_demand_is_told_by_the_world_that_it_was_measured_in(tmp_path, ranks):
    """Each device takes 64 images in 0.3 s of computing, and waits 0.1 s more for them; whoever goes on needs 213/s."""
    with Telemetry(
        tmp_path, label="pretrain", every_steps=2, total_steps=9, steps_per_epoch=9, global_batch=64 * ranks,
        world_size=ranks, start_step=0, sums=None, writes=True,
    ) as telemetry:  # fmt: skip
        telemetry.clock.take = lambda: {"data_wait": 0.2}
        for done in (1, 2):
            telemetry.step(done, loss=1.0, grad_norm=1.0, lr=0.1, step_s=0.4)
    assert measured_demand(tmp_path) == pytest.approx(64 / 0.3, rel=1e-3)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        '{"images_per',
        '{"step": 3}\n',
        "[]\n",
        '{"step": 1, "images_per_s": 1, "step_s": 0, "data_wait_s": 0, "world_size": 1}\n',
        '{"step": 1, "images_per_s": 1, "step_s": 1, "data_wait_s": 0}\n',  # of how many ranks?
    ],
)
def test_no_record_or_half_a_line_is_no_demand(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert measured_demand(tmp_path) is None
