"""The package's log: what each rank prints, and that nothing is left behind."""

import json
import logging
import os
import re
import subprocess
import sys
from datetime import datetime

import pytest

from livt_scale.util.log import EVERY_RANK, FILE_ONLY, ROOT, line, rank_of_process, to_file, to_stderr

LOGGER = logging.getLogger(f"{ROOT}.some.module")
LAUNCHERS = [("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")]


def printed(capsys, **options):
    with to_stderr(**options):
        LOGGER.debug("detail")
        LOGGER.info("progress %d", 1)
        LOGGER.info("profile", extra=EVERY_RANK)
        LOGGER.warning("disk")
        LOGGER.error("lost")
    captured = capsys.readouterr()
    assert captured.out == ""  # results alone go there
    return [without_clock(line) for line in captured.err.splitlines()]


def without_clock(text):
    """`text` after its date and time, which it must have."""
    moment, rest = text[:19], text[20:]
    assert abs((datetime.now() - datetime.strptime(moment, "%Y-%m-%d %H:%M:%S")).total_seconds()) < 60
    return rest


def test_one_process_prints_progress_as_it_is_and_marks_warnings(capsys):
    assert printed(capsys) == ["progress 1", "profile", "livt: warning: disk", "livt: error: lost"]


@pytest.mark.parametrize("names", LAUNCHERS, ids=lambda names: names[0])
def test_progress_comes_from_rank_0_and_warnings_from_all_with_their_rank(capsys, monkeypatch, names):
    monkeypatch.setenv(names[1], "4")
    monkeypatch.setenv(names[0], "0")
    first = ["progress 1", "rank 0: profile", "livt: warning on rank 0: disk", "livt: error on rank 0: lost"]
    assert printed(capsys) == first
    monkeypatch.setenv(names[0], "3")
    assert printed(capsys) == ["rank 3: profile", "livt: warning on rank 3: disk", "livt: error on rank 3: lost"]


def test_debug_prints_everything(capsys):
    assert printed(capsys, debug=True)[0] == "detail"


def test_a_block_inside_a_block_prints_each_line_once_and_nothing_stays_installed(capsys):
    logger = logging.getLogger(ROOT)
    before = (list(logger.handlers), logger.level, logger.propagate)
    with to_stderr():
        assert printed(capsys)[0] == "progress 1"
        LOGGER.info("still")
    assert without_clock(capsys.readouterr().err) == "still\n"
    assert (list(logger.handlers), logger.level, logger.propagate) == before


def test_the_line_goes_to_the_stderr_of_the_moment(capsys, monkeypatch, tmp_path):
    """A progress bar replaces sys.stderr while it is drawn."""
    with to_stderr(), (tmp_path / "bar").open("w") as bar:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", bar)
            LOGGER.info("above the bar")
        LOGGER.info("below")
    assert without_clock((tmp_path / "bar").read_text()) == "above the bar\n"
    assert without_clock(capsys.readouterr().err) == "below\n"


def test_a_library_that_configures_the_root_logger_prints_no_line_twice(tmp_path):
    code = (
        "import logging\nfrom livt_scale.util.log import to_stderr\nlogging.basicConfig(level=logging.DEBUG)\n"
        "with to_stderr():\n    logging.getLogger('livt_scale.x').info('once')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, without_clock(done.stderr)) == ("", "once\n")


def test_variables_that_are_no_numbers_are_no_rank(monkeypatch):
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank_of_process() == (0, 1)
    assert line("error", json.dumps("x")) == 'livt: error: "x"'


def test_a_terminal_gets_the_time_of_day_alone(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with to_stderr():
        LOGGER.info("x")
    assert re.fullmatch(r"\d\d:\d\d:\d\d x\n", capsys.readouterr().err)


def a_start(path, number):
    with to_stderr(), to_file(path):
        LOGGER.info("start %d", number)
        LOGGER.info("progress", extra=FILE_ONLY)
        raise RuntimeError("two\nlines")


def test_a_file_gets_every_line_of_every_start_and_what_ended_it(capsys, tmp_path):
    for number in range(2):
        with pytest.raises(RuntimeError):
            a_start(tmp_path / "log.txt", number)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    ended = "livt: error: two\\nlines"
    assert [without_clock(text) for text in lines] == ["start 0", "progress", ended, "start 1", "progress", ended]
    assert "progress" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "pipe", "nowhere"])
def test_a_place_that_takes_no_log_is_reported_and_the_block_runs(tmp_path, caplog, kind):
    path = tmp_path / "log.txt"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "nowhere": lambda: None}[kind]()
    with caplog.at_level(logging.INFO, logger=ROOT), to_file(path / "log.txt" if kind == "nowhere" else path):
        LOGGER.info("on")
    assert caplog.messages[-1] == "on"
    assert "cannot be written" in caplog.messages[0]
