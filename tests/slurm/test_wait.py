"""`livt submit --wait`: until the queue has no job of the runs, within a bound; then the code of what they recorded."""

import types

import pytest

from livt_scale.slurm import wait as waiting
from livt_scale.slurm.wait import wait, worst
from livt_scale.util.errors import ClusterError
from tests.slurm.made_runs import MadeRun
from tests.slurm.replayed_slurm import ReplayedSlurm


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return ReplayedSlurm(tmp_path, monkeypatch)


@pytest.fixture
def runs(tmp_path):
    found = [MadeRun(tmp_path / name) for name in "ab"]
    for number, run in enumerate(found):
        run.chain((f"1{number}", "pretrain"), chain=f"livt {number}")
    return found


@pytest.fixture
def clock(monkeypatch):
    """Time passes where the wait pauses; `clock.then` are calls, one a pause."""
    clock = types.SimpleNamespace(now=0.0, then=[])

    def sleep(seconds: float) -> None:
        clock.now += seconds
        if clock.then:
            clock.then.pop(0)()

    monkeypatch.setattr(waiting, "time", types.SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    return clock


def queue(fake, *numbers):
    """Jobs that run, in the columns that both questions read: the comment is the third, and the last."""
    fake.says("squeue", "".join(f"1{n}|RUNNING|livt {n}\n" for n in numbers))


def finished(run, state):
    for stage in ("pretrain", "finetune"):
        run.status(state, stage, why="" if state == "done" else "it said so")
    (run.dir / "export").mkdir(exist_ok=True)
    (run.dir / "export" / "eval.json").write_text("{}")


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (("done", "done"), 0),
        (("done", "failed"), 1),
        (("preempted", "done"), 85),
        (("preempted", "failed"), 1),
    ],
)
def test_the_code_is_that_of_the_runs_once_none_is_in_the_queue(fake, runs, clock, states, code):
    told: list[str] = []
    queue(fake, 0, 1)

    def first_ends() -> None:
        finished(runs[0], states[0])
        queue(fake, 1)

    def second_ends() -> None:
        finished(runs[1], states[1])
        queue(fake)

    clock.then = [first_ends, second_ends]
    assert wait([run.dir for run in runs], wait_s=3600, say=told.append) == code
    assert clock.now == 60
    assert [line for line in told if line.startswith(f"{runs[0].dir}: ")][-1].startswith(f"{runs[0].dir}: {states[0]}")


def test_a_run_whose_jobs_ended_without_a_record_has_failed(fake, runs, clock):
    queue(fake)
    assert wait([runs[0].dir], wait_s=10, say=lambda _: None) == 1


def test_the_wait_is_bounded(fake, runs, clock):
    queue(fake, 0)
    with pytest.raises(ClusterError, match="1 of 2 runs are not over after 100 s") as told:
        wait([run.dir for run in runs], wait_s=100, say=lambda _: None)
    assert "livt cancel" in told.value.remedy
    assert clock.now == 100


def test_a_line_is_printed_where_something_changed_and_now_and_then(fake, runs, clock):
    told: list[str] = []
    queue(fake, 0)
    with pytest.raises(ClusterError):
        wait([runs[0].dir], wait_s=700, say=told.append)
    assert len(told) == 2  # at 0 and 600 s


def test_a_controller_that_does_not_answer_for_a_while_does_not_end_the_wait(fake, runs, clock):
    told: list[str] = []
    finished(runs[0], "done")
    fake.says("squeue", error="Unable to contact slurm controller", code=1)
    clock.then = [lambda: queue(fake)]
    assert wait([runs[0].dir], wait_s=100, say=told.append) == 0
    assert any("Unable to contact" in line for line in told)


def test_the_worst_of_several():
    assert [worst(codes) for codes in ([0, 0], [0, 85], [85, 1, 0])] == [0, 85, 1]


def test_slurm_is_asked_once_for_all_runs_at_each_look(runs, fake, clock):
    queue(fake, 0, 1)
    with pytest.raises(ClusterError):
        wait([run.dir for run in runs], wait_s=0, say=lambda _: None)
    asked = [call for call in fake.calls if call[0] == "squeue"]
    assert len(asked) == 2  # which runs are over; and what all their jobs do
