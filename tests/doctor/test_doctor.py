"""`livt doctor`: judgements of machines that this one is not, and the report of the one it is."""

import json
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from livt_scale.cli.doctor import doctor
from livt_scale.doctor import checks

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


def livt_doctor(*args):
    app = typer.Typer()
    app.command()(doctor)
    return CliRunner().invoke(app, list(args))


def test_the_tested_versions_are_those_of_the_constraints():
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {name: pinned[name] for name in checks.TESTED} == checks.TESTED


@pytest.mark.parametrize(
    ("finding", "status"),
    [
        (checks.judge_python((3, 10)), "problem"),
        (checks.judge_python((3, 11)), "ok"),
        (checks.judge_python((3, 14)), "note"),
        (checks.judge_library("torch", None, wanted=">=2.11", tested="2.14.1"), "problem"),
        (checks.judge_library("torch", "2.10.0", wanted=">=2.11", tested="2.14.1"), "problem"),
        (checks.judge_library("torch", "2.12.0", wanted=">=2.11", tested="2.14.1"), "note"),
        (checks.judge_library("torch", "2.14.1+cpu", wanted=">=2.11", tested="2.14.1"), "ok"),
        (checks.judge_library("rich", "99", wanted="", tested=None), "ok"),
        (checks.judge_memory(64 * GIB, 40 * GIB), "ok"),
        (checks.judge_memory(64 * GIB, GIB), "note"),
        (checks.judge_shared_memory(None), "note"),
        (checks.judge_shared_memory(64 * 2**20), "note"),
        (checks.judge_shared_memory(8 * GIB), "ok"),
        (checks.judge_compiler(None, has_gpu=True), "note"),
        (checks.judge_compiler(None, has_gpu=False), "ok"),
        (checks.judge_compiler("/usr/bin/gcc", has_gpu=True), "ok"),
        (checks.judge_open_files(1024, 524288), "ok"),
        (checks.judge_open_files(1024, 1024), "note"),
        (checks.judge_disk(100 * GIB, folder="/x", writable=True), "ok"),
        (checks.judge_disk(100 * GIB, folder="/x", writable=False), "note"),
        (checks.judge_disk(GIB, folder="/x", writable=True), "note"),
        (checks.judge_slurm([]), "note"),
        (checks.judge_slurm(["sbatch"]), "note"),
        (checks.judge_slurm(list(checks.SLURM_COMMANDS)), "ok"),
    ],
)
def test_a_machine_is_judged_and_a_problem_comes_with_what_to_do(finding, status):
    assert finding.status == status
    assert finding.message
    assert finding.fix or status != "problem"


def test_this_machine_is_reported_line_by_line_and_as_json():
    result = livt_doctor("--json")
    report = json.loads(result.stdout)
    names = [check["name"] for check in report["checks"]]
    for name in (
        "python",
        "torch",
        "deepspeed",
        "processors",
        "memory",
        "shared memory",
        "open files",
        "disk",
        "gloo",
        "jpeg",
        "slurm",
    ):
        assert name in names
    assert result.exit_code == (0 if report["ok"] else 1)
    assert report["ok"] == all(check["status"] != "problem" for check in report["checks"])


def test_a_check_that_breaks_is_a_problem_and_the_others_go_on(monkeypatch):
    def _broken_thing():
        raise ValueError("odd machine")

    monkeypatch.setattr(checks, "CHECKS", (_broken_thing, checks._python))
    result = livt_doctor()
    assert result.exit_code == 1
    assert re.search(r"problem +broken thing +the check itself failed: ValueError: odd machine", result.output)
    assert "python" in result.output


def test_files_in_the_page_cache_of_a_container_do_not_take_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "CGROUP", tmp_path)
    for name, text in {"max": f"{GIB}\n", "current": f"{GIB}\n", "stat": f"anon 9\ninactive_file {GIB // 2}\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    (finding,) = checks._memory()
    assert finding.message.startswith("0.5 GiB available of 1.0")


def test_a_limit_of_the_container_counts_as_the_memory_there_is():
    (finding,) = checks._memory()
    assert re.fullmatch(r"[\d.]+ GiB available of [\d.]+.*", finding.message)


def test_slurm_is_found_on_the_path(monkeypatch, tmp_path):
    folder = tmp_path / "it's a bin\nfolder"
    folder.mkdir()
    for command in checks.SLURM_COMMANDS:
        (folder / command).write_text("#!/bin/sh\n")
        (folder / command).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    assert checks._slurm()[0].status == "ok"
