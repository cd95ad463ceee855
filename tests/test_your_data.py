"""docs/your-data.md runs as it stands: its commands are given, in their order, in a folder like the project's."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm

REPO = Path(__file__).resolve().parents[1]
PAGE = (REPO / "docs/your-data.md").read_text(encoding="utf-8")
LIVT = ".venv/bin/livt "
BLOCK = re.compile(r"^```(sh|text)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path):
    """The parts of the project that the page uses, with a .venv of its own whose livt is the one that is tested."""
    for name in ("recipes", "slurm"):
        (tmp_path / name).symlink_to(REPO / name)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in {"python": "", "livt": "-m livt_scale"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
    return tmp_path


def bash(folder, text):
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(["bash", "-e"], input=text, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def bash_and_warm_livt(folder, text):
    """The same, but `livt` starts from the server of processes, which saves most of its time."""
    printed = ""
    for is_livt, lines in itertools.groupby(text.splitlines(), lambda line: line.startswith(LIVT)):
        if not is_livt:
            printed += bash(folder, "\n".join(lines) + "\n")
            continue
        for line in lines:
            words, _, file = line.removeprefix(LIVT).partition(" > ")
            said = warm.run(["-m", "livt_scale", *shlex.split(words)], cwd=folder, check=True).stdout
            if file:
                (folder / file).write_text(said)
            else:
                printed += said
    return printed


def give(folder, part, *, run=bash):
    """The `sh` blocks of `part`: [[commands, what came out, what the `text` block behind them says], …]."""
    given = []
    for kind, text in BLOCK.findall(part):
        if kind == "text":
            given[-1][2] = text
        else:
            given.append([text, run(folder, text), ""])
    return given


BEFORE, AFTER = PAGE.split("## Training\n")


@pytest.mark.slow
def test_the_commands_up_to_training_run_and_print_what_the_page_says(folder):
    given = give(folder, BEFORE, run=bash_and_warm_livt)
    assert sum(len(re.findall(r"^\.venv/bin/livt", text, re.MULTILINE)) for text, *_ in given) >= 5
    assert [told for *_, told in given if told], "the page shows what comes out"
    assert_printed(given)


def assert_printed(given):
    for text, output, told in given:
        assert told in output, text


@pytest.mark.slow
def test_the_whole_page_runs_and_its_model_has_learnt(folder):
    assert_printed(give(folder, BEFORE))
    given = give(folder, AFTER)
    assert "state     done: finetune" in given[0][1]
    jobs = (folder / "data/submit.txt").read_text()
    assert [f"# ===== {stage} =====" in jobs for stage in ("pretrain", "finetune", "evaluate")] == [True] * 3
    report, told = given[-1][1:]
    found, said = (float(re.search(r"top-1 │ *([0-9.]+)", text)[1]) for text in (report, told))
    assert abs(found - said) < 10, "about what the page shows; another processor sums in another order"
    assert [line.split(":")[0] for line in report.splitlines()[-6:]] == [
        line.split(":")[0] for line in told.splitlines()[-6:]
    ]
