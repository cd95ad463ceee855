"""The package's log: what each rank prints, and that nothing is left behind."""

import json
import logging
import subprocess
import sys

import pytest

from livt_scale.util.log import EVERY_RANK, ROOT, line, rank_of_process, to_stderr

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
    return captured.err.splitlines()


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
    assert capsys.readouterr().err == "still\n"
    assert (list(logger.handlers), logger.level, logger.propagate) == before


def test_the_line_goes_to_the_stderr_of_the_moment(capsys, monkeypatch, tmp_path):
    """A progress bar replaces sys.stderr while it is drawn."""
    with to_stderr(), (tmp_path / "bar").open("w") as bar:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", bar)
            LOGGER.info("above the bar")
        LOGGER.info("below")
    assert (tmp_path / "bar").read_text() == "above the bar\n"
    assert capsys.readouterr().err == "below\n"


def test_a_library_that_configures_the_root_logger_prints_no_line_twice(tmp_path):
    code = (
        "import logging\nfrom livt_scale.util.log import to_stderr\nlogging.basicConfig(level=logging.DEBUG)\n"
        "with to_stderr():\n    logging.getLogger('livt_scale.x').info('once')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "once\n")


def test_variables_that_are_no_numbers_are_no_rank(monkeypatch):
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank_of_process() == (0, 1)
    assert line("error", json.dumps("x")) == 'livt: error: "x"'
