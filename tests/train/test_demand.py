"""What a step takes from its loader is known from an earlier part of the run, if there is one."""

from __future__ import annotations

import json

import pytest

from livt_scale.distributed.world import World
from livt_scale.train.telemetry.metrics_log import MetricsLog, measured_demand
from tests.train.loops import a_step, idle_loop, started, take


def test_demand_is_what_the_steps_would_take_without_waiting(tmp_path):
    lines = [
        {"step": 1, "images_per_s": 1.0, "step_s": 1, "data_wait_s": 0, "world_size": 1},
        {"step": 2, "images_per_s": 800.0, "step_s": 2.0, "data_wait_s": 1.0, "world_size": 4},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured_demand(tmp_path) == pytest.approx(400)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_rank_s_demand_is_told_by_the_world_that_it_was_measured_in(tmp_path, ranks):
    """Each device takes 64 images in 0.3 s of computing, and waits 0.1 s more for them: it needs 213/s."""
    loop = idle_loop(MetricsLog(tmp_path), total=9, epoch=9, log_every=2, batch=64 * ranks, world=World(0, ranks))
    loop.clock.take = lambda: {"data_wait": 0.2}
    with started(loop):
        for done in (1, 2):
            take(loop, a_step(done, seconds=0.4))
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
