"""Traces of chosen steps: written completely or not at all, and never a reason to end a run."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

from livt_scale.config.runtime import Log
from livt_scale.distributed.world import World
from livt_scale.train.loop import Hook
from livt_scale.train.telemetry import profiler as profile
from livt_scale.train.telemetry.profiler import Profiler
from tests.train.loops import a_step, idle_loop, started, take


class Work(Hook):
    """A step's work, to be found in the trace."""

    def after_backward(self, loop, step):
        torch.ones(8, 8) @ torch.ones(8, 8)


@pytest.fixture
def run(caplog):
    def run(folder, *, steps, begin=1, end=6, rank=0) -> list[str]:
        """Steps `begin` to `end` under the profiler; what it logged."""
        caplog.clear()
        world = World(rank, rank + 1)
        with caplog.at_level("INFO"), started(idle_loop(Profiler(folder, steps=steps), Work(), world=world)) as loop:
            for number in range(begin, end + 1):
                take(loop, a_step(number))
        return caplog.messages

    return run


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def test_the_steps_asked_for_are_traced(tmp_path, run):
    folder = tmp_path / "a folder's"
    (said,) = run(folder, steps=(2, 3), rank=4)
    assert names(folder) == ["steps-2-3-rank-4.json.gz"]
    assert "steps 2 to 3" in said
    trace = json.loads(gzip.decompress((folder / "steps-2-3-rank-4.json.gz").read_bytes()))
    assert sum(event.get("name") == "aten::mm" for event in trace["traceEvents"]) == 2


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [(3, 6, ["steps-3-4-rank-0.json.gz"]), (1, 3, ["steps-2-3-rank-0.json.gz"]), (5, 6, [])],
    ids=["continued within", "stopped within", "continued behind"],
)
def test_what_a_run_takes_of_the_steps_is_traced(tmp_path, run, begin, end, expected):
    run(tmp_path / "p", steps=(2, 4), begin=begin, end=end)
    assert names(tmp_path / "p") == expected


def test_no_steps_no_folder(tmp_path, run):
    assert run(tmp_path / "p", steps=(7, 9)) == []
    assert not (tmp_path / "p").exists()


def test_a_trace_that_cannot_be_written_is_logged(tmp_path, run, monkeypatch):
    (tmp_path / "p").write_text("a file where the folder should be")
    (said,) = run(tmp_path / "p", steps=(1, 2))
    assert said.startswith("no profile of steps 1 to 2: ")

    def full(*_args, **_named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile.shutil, "copyfileobj", full)
    (said,) = run(tmp_path / "q", steps=(1, 2))
    assert "No space left on device" in said
    assert names(tmp_path / "q") == []


def test_a_trace_that_is_too_large_is_not_kept(tmp_path, run, monkeypatch):
    monkeypatch.setattr(profile, "MAX_BYTES", 100)
    (said,) = run(tmp_path / "p", steps=(1, 2))
    assert "trace fewer steps" in said
    assert names(tmp_path / "p") == []


@pytest.mark.parametrize("steps", [[5, 4], [1, 21], [0, 1]])
def test_steps_that_are_none_or_too_many_are_refused(steps):
    with pytest.raises(ValueError, match="profile_steps"):
        Log(profile_steps=steps)


def test_ranks_without_steps_have_no_effect_and_are_refused():
    with pytest.raises(ValueError, match="profile_ranks has no effect"):
        Log(profile_ranks="all")
