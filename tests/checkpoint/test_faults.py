"""What can break is broken: the process killed at each write, the disk full half way."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests import warm

FAULTS = Path(__file__).with_name("faults.py")


def run_faults(*arguments: str | Path) -> dict:
    done = warm.run(["-W", "error", FAULTS, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("step", ["new", "same"])
def test_killed_at_any_write_either_the_old_or_the_new_one_is_found_whole(tmp_path, step):
    seen = run_faults("kill", tmp_path, step)
    assert seen["points"] > 30  # the hooks do see the writes
    assert seen["old"] > 10
    assert seen["new"] > 2


def test_killed_at_random_moments_of_async_saves_the_newest_is_whole(tmp_path):
    assert run_faults("loop", tmp_path)["reached"] > 0


def test_a_file_size_limit_leaves_the_old_ones_and_no_half_written_folder(tmp_path):
    said = run_faults("limit", tmp_path)["said"]
    assert "ulimit -f" in said
    assert "MiB are free" in said or "GiB are free" in said


def test_a_full_file_system_leaves_the_old_ones_and_no_half_written_folder(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        before, half_way = run_faults("full", tmp_path)["said"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert re.search(r"it needs 7\.7 MiB, (1\.9|2\.0) MiB are free", before)
    assert "the disk is full: it needs 7.7 MiB" in half_way


def test_a_disk_that_turns_read_only_is_told_and_what_is_there_stays(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        saved, opened = run_faults("readonly", tmp_path)["said"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert "step-00000002 was not saved: Read-only file system" in saved
    assert "cannot write checkpoints" in opened
    assert "Read-only file system" in opened
