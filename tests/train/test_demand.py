"""What the step took from its loader is known from the part of the run before, if there was one."""

from __future__ import annotations

import json

import pytest

from livt_scale.train.telemetry import measured_demand


def test_demand_is_what_the_steps_would_take_without_waiting(tmp_path):
    lines = [
        {"images_per_s": 1.0, "step_s": 1, "data_wait_s": 0},
        {"images_per_s": 800.0, "step_s": 2.0, "data_wait_s": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert measured_demand(tmp_path, world_size=4) == pytest.approx(400)


@pytest.mark.parametrize(
    "text", [None, "", '{"images_per', '{"step": 3}\n', "[]\n", '{"images_per_s": 1, "step_s": 0, "data_wait_s": 0}\n']
)
def test_no_record_or_half_a_line_is_no_demand(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert measured_demand(tmp_path, world_size=1) is None
