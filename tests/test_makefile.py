"""The one door: it installs once, again after a kill or a change, and says what it can do."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A Python that notes what it is asked to do, makes a venv of itself, and fails where the test says so.
FAKE = """#!/bin/sh
echo "$*" >> "$CALLS"
case "$*" in
  "-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m pip install"*) exit "${FAIL:-0}" ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "it's a clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "fakepython").write_text(FAKE)
    (folder / "fakepython").chmod(0o755)
    return folder


def make(folder, *arguments, **environment):
    """(exit code, what it said, how often it installed)."""
    calls = folder / "calls"
    calls.write_text("")
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    command = ["make", "PYTHON=./fakepython", *arguments]
    result = subprocess.run(
        command, cwd=folder, env={**kept, "CALLS": str(calls), **environment}, capture_output=True, text=True
    )
    installs = len(re.findall(r"^-m pip install", calls.read_text(), re.MULTILINE))
    return result.returncode, result.stdout + result.stderr, installs


def test_it_installs_once_and_again_when_what_it_depends_on_changes(clone):
    assert make(clone, "install")[::2] == (0, 1)
    assert make(clone, "install")[::2] == (0, 0)
    later = (clone / ".venv/.ready").stat().st_mtime + 10
    os.utime(clone / "constraints.txt", (later, later))
    assert make(clone, "install")[::2] == (0, 1)


def test_an_install_that_did_not_end_is_done_again(clone):
    assert make(clone, "install", FAIL="7")[::2] == (2, 1)
    assert not (clone / ".venv/.ready").exists()
    assert make(clone, "install")[::2] == (0, 1)


def test_without_python_it_says_what_to_install(clone):
    code, said, installs = make(clone, "PYTHON=python3.11-is-not-here", "install")
    assert (code, installs) == (2, 0)
    assert "there is no python3.11-is-not-here" in said


def test_alone_it_lists_every_target(clone):
    code, said, installs = make(clone)
    assert (code, installs) == (0, 0)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(phony) == set(re.findall(r"^  make ([a-z0-9-]+) ", said, re.MULTILINE))
    assert {"quickstart", "test", "test-slow", "lint", "format", "golden", "compare", "bench", "help"} <= set(phony)
