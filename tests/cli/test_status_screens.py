"""The screen of `livt status` in each situation, as golden files, and the command that it proposes."""

from __future__ import annotations

import json
import re
import shlex
import socket
import time
from typing import get_args

import pytest

from livt_scale.cli import main
from livt_scale.slurm.next_step import NEXT, Situation
from livt_scale.slurm.reasons import REASONS, first_word, reason_in_words
from livt_scale.slurm.status import State
from tests.cli.commands import livt
from tests.slurm.made_runs import MadeRun, ended, ended_pid, row

TOP1 = {"all": 0.45249, "many": 0.601, "medium": 0.4, "few": 0.123}
CHAIN = (("14", "pretrain"), ("15", "finetune"), ("16", "evaluate"))
WAIT = tuple(row(job, "PENDING", "Dependency") for job in ("15", "16"))


def accuracy(run: MadeRun, folder: str = "finetune") -> None:
    (run.dir / folder).mkdir(exist_ok=True)
    (run.dir / folder / "eval.json").write_text(json.dumps({"top1": TOP1}))


def at(after_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + after_s))


def pending(run, fake):
    """Nothing was submitted."""


def queued(run, fake):
    run.chain(*CHAIN)
    start = at(3 * 3600 + 30)
    fake.squeue(row("14", "PENDING", "Resources", start=start), *WAIT)


def requeued(run, fake):
    run.chain(*CHAIN)
    run.status("preempted", why="stopped by SIGUSR2", step=120, total_steps=1000)
    fake.squeue(row("14", "PENDING", "QOSMaxJobsPerUserLimit"), *WAIT)


def held(run, fake):
    run.chain(*CHAIN)
    fake.squeue(row("14", "PENDING", "JobHeldUser"), *WAIT)


def never(run, fake):
    run.chain(*CHAIN)
    run.status("done", step=1000, total_steps=1000)
    fake.squeue(row("15", "PENDING", "DependencyNeverSatisfied"), WAIT[1])
    fake.sacct(ended("14", "FAILED", "1:0"))


def running(run, fake):
    run.chain(*CHAIN)
    run.status("running", step=120, total_steps=1000)
    run.beat(0)
    run.beat(1, step=119, phase="data")
    run.metrics(4.0, 3.0, None, 2.0, 1.0, 0.5)
    fake.squeue(row("14", "RUNNING", nodes="livt-n[1-2]"), *WAIT)


def preempted(run, fake):
    run.status("preempted", why="stopped by SIGTERM", step=120, total_steps=1000)


def failed(run, fake):
    run.chain(*CHAIN)
    run.end("14", why="module load cuda failed")
    fake.says("sacct", error="Slurm accounting storage is disabled\n", code=1)


def failed_by_its_record(run, fake):
    run.chain(*CHAIN)
    run.status("failed", why="the loss is nan", step=33, total_steps=1000)
    run.end("14", why="pretrain failed with exit code 1")
    fake.sacct(ended("14", "FAILED", "1:0"), ended("15", "CANCELLED by 0"), ended("16", "CANCELLED by 0"))


def stalled(run, fake):
    run.status("running", pid=ended_pid(), step=120, total_steps=1000)


def gone(run, fake):
    run.chain(*CHAIN)
    fake.says("sacct", error="Slurm accounting storage is disabled\n", code=1)


def done(run, fake):
    run.status("done", step=1000, total_steps=1000)
    run.status("done", "finetune", step=200, total_steps=200)
    accuracy(run)


def done_chain(run, fake):
    run.chain(*CHAIN)
    done(run, fake)
    accuracy(run, "export")
    fake.sacct(*(ended(job, "COMPLETED") for job, _ in CHAIN))


def done_pretrained(run, fake):
    (run.dir / "recipe.yaml").write_text("name: little\nstages: {pretrain: {epochs: 50}}\n")
    run.status("done", step=1000, total_steps=1000)


SCREENS = {
    "pending": (pending, "pending"),
    "pending-queued": (queued, "pending: in the queue"),
    "pending-requeued": (requeued, "pending: in the queue"),
    "pending-held": (held, "pending: held"),
    "pending-never": (never, "pending: can never start"),
    "running": (running, "running"),
    "preempted": (preempted, "preempted"),
    "failed": (failed_by_its_record, "failed"),
    "failed-early": (failed, "failed"),
    "stalled": (stalled, "stalled"),
    "stalled-gone": (gone, "stalled"),
    "done": (done, "done"),
    "done-chain": (done_chain, "done"),
    "done-pretrained": (done_pretrained, "done: pretrained"),
}


def steady(text: str, run: MadeRun) -> str:
    """Without what differs between two runs of a test."""
    text = text.replace(str(run.dir), "runs/little").replace(socket.gethostname(), "HOST")
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?", "DATE", text)
    return re.sub(r"\b\d+ s ago", "0 s ago", re.sub(r"of life for \d+ s", "of life for 0 s", text))


@pytest.mark.parametrize("name", SCREENS)
def test_the_screen_of_each_situation(run, fake, golden, name):
    make, situation = SCREENS[name]
    make(run, fake)
    if situation != "pending" and not (run.dir / "slurm" / "submitted.yaml").exists():
        (run.dir / "slurm").mkdir(exist_ok=True)
        (run.dir / "slurm" / "submitted.yaml").write_text("name: little\n")
    result = livt("status", run.dir)
    assert result.exit_code == int(situation == "failed")
    golden(f"status/{name}.txt", steady(result.stdout, run))


def test_each_state_and_each_situation_has_a_line_and_a_screen():
    assert set(NEXT) == set(get_args(Situation)) == {situation for _, situation in SCREENS.values()}
    assert {situation.split(":")[0] for situation in NEXT} == set(get_args(State))


@pytest.mark.parametrize("line", NEXT.values(), ids=NEXT)
def test_what_a_line_proposes_are_commands_that_exist(line):
    commands = {command.name or command.callback.__name__ for command in main.app.registered_commands}
    text = line.format(run="runs/a", job="14", where="the start", resume="livt submit x.yaml")
    assert [word for word in re.findall(r"\blivt (\w+)", text) if word not in commands] == []
    assert re.match(r"(livt|scontrol) ", text)
    assert "  # " in text


def test_the_line_can_be_pasted_into_a_shell(tmp_path):
    run = MadeRun(tmp_path / 'it\'s a "run" $(x) # here')
    run.status("failed", why="x")
    line = next(text for text in livt("status", run.dir).stdout.splitlines() if text.startswith("next "))
    assert shlex.split(line.removeprefix("next "), comments=True) == ["livt", "logs", str(run.dir)]


def test_the_accuracy_is_in_json_and_in_the_line_of_many_runs(run, fake):
    done(run, fake)
    told = json.loads(livt("status", run.dir, "--json").stdout)
    assert told["accuracy"] == TOP1
    assert told["next"].startswith(f"livt predict {run.dir} ")
    assert "top-1 45.2%" in livt("status", run.dir.parent).stdout


@pytest.mark.parametrize("text", ["", "{", '{"top1": 3}', '{"top1": {"all": "x"}}', "[]", '{"top1": null}'])
def test_a_damaged_report_is_no_accuracy(run, fake, text):
    done(run, fake)
    (run.dir / "finetune" / "eval.json").write_text(text)
    told = json.loads(livt("status", run.dir, "--json").stdout)
    assert (told["state"], told["accuracy"]) == ("done", None)


@pytest.mark.parametrize("start", ["N/A", "Unknown", "2020-01-01T00:00:00"])
def test_without_an_estimate_or_with_one_that_has_passed_no_start_is_promised(run, fake, start):
    run.chain(*CHAIN)
    fake.squeue(row("14", "PENDING", "Priority", start=start))
    assert "start     Slurm has made no estimate yet" in livt("status", run.dir).stdout
    assert json.loads(livt("status", run.dir, "--json").stdout)["starts_at"] is None


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", REASONS["ReqNodeNotAvail"]),
        ("(Resources)", REASONS["Resources"]),
        ("QOSGrpNodeLimit", "a limit of its QOS is reached"),
        ("QOSMaxGRESPerUser", "a limit of its QOS is reached"),
        ("AssocGrpBillingMinutes", "a limit of its account is reached"),
        ("MaxJobsPerAccount", "a limit of its account is reached"),
        ("launch failed requeued held", REASONS["launch"]),
        ("SomethingNew", ""),
        ("", ""),
    ],
)
def test_reasons_are_put_into_words(reason, words):
    assert reason_in_words(reason) == words


def test_the_name_of_a_reason_is_one_word():
    assert [word for word in REASONS if first_word(word) != word] == []
