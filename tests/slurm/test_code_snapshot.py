"""The frozen code is complete, what was submitted, and what Python then imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from livt_scale.cli import main
from livt_scale.slurm.code_snapshot import PACKAGE, check_running_code, freeze, keep_git_view, read_code
from livt_scale.util.errors import ClusterError


@pytest.fixture
def package(tmp_path):
    package = tmp_path / "checkout" / "livt_scale"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("WHO = 'frozen'\n")
    (package / "deep" / "x.py").write_text("x = 1\n")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_bytes(b"stale")
    return package


def frozen_in(folder, package):
    return freeze(read_code(package), folder)


def test_the_same_code_gives_the_same_folder(tmp_path, package):
    one, two = (frozen_in(tmp_path / "run", package) for _ in range(2))
    assert one == two == read_code(package).frozen_in(tmp_path / "run")
    assert [p.name for p in (tmp_path / "run" / "code").iterdir()] == [one.sha256[:16]]
    assert sorted(str(p.relative_to(one.folder)) for p in one.folder.rglob("*") if p.is_file()) == [
        "SHA256SUMS", "livt_scale/__init__.py", "livt_scale/deep/x.py"
    ]  # fmt: skip


def test_other_code_gives_another_folder(tmp_path, package):
    first = frozen_in(tmp_path / "run", package)
    (package / "deep" / "x.py").write_text("x = 2\n")
    second = frozen_in(tmp_path / "run", package)
    assert first.sha256 != second.sha256
    assert (first.folder / "livt_scale" / "deep" / "x.py").read_text() == "x = 1\n"  # what was edited since stays out


def test_a_frozen_folder_that_was_changed_is_not_used_again(tmp_path, package):
    frozen = frozen_in(tmp_path / "run", package)
    file = frozen.folder / "livt_scale" / "deep" / "x.py"
    file.chmod(0o644)
    file.write_text("x = 3\n")
    with pytest.raises(ClusterError, match=r"livt_scale/deep/x\.py changed"):
        frozen_in(tmp_path / "run", package)


def test_a_copy_that_is_broken_off_leaves_nothing_under_its_name(tmp_path, package, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        frozen_in(tmp_path / "run", package)
    assert list((tmp_path / "run" / "code").iterdir()) == []


def test_sha256sum_agrees(tmp_path, package):
    frozen = frozen_in(tmp_path / "run it's", package)
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=frozen.folder, capture_output=True)
    assert done.returncode == 0


def test_python_imports_the_frozen_package_from_inside_a_checkout(tmp_path, package):
    """-P and PYTHONPATH as the batch script sets them, in a folder that has a livt_scale of its own."""
    frozen = frozen_in(tmp_path / "run", package)
    code = "import livt_scale; print(livt_scale.WHO, livt_scale.__file__)"
    env = dict(os.environ) | {"PYTHONPATH": str(frozen.folder)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=PACKAGE.parent, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["frozen", str(frozen.folder / "livt_scale" / "__init__.py")]


@pytest.mark.parametrize(("code", "fails"), [(None, False), (PACKAGE.parent, False), ("/nowhere/code/0123", True)])
def test_a_process_of_a_job_that_runs_other_code_ends(code, fails):
    environ = {} if code is None else {"LIVT_CODE": str(code)}
    if not fails:
        check_running_code(environ)
        return
    with pytest.raises(ClusterError, match="PYTHONPATH did not reach it") as told:
        check_running_code(environ)
    assert "/nowhere/code/0123" in told.value.message
    assert str(PACKAGE) in told.value.message


def test_each_command_of_livt_in_a_job_checks_it(monkeypatch):
    monkeypatch.setenv("LIVT_CODE", "/nowhere/code/0123")
    result = CliRunner().invoke(main.app, ["train", "no.yaml"])
    assert isinstance(result.exception, ClusterError)


def test_gits_view_is_kept_with_what_is_not_committed(tmp_path, package):
    checkout = package.parent
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    (package / "deep" / "x.py").write_text("x = 4\n")
    folder = tmp_path / "run" / "slurm"
    view = keep_git_view(folder, checkout=checkout)
    assert view == json.loads((folder / "git.json").read_text())
    assert len(view["commit"]) == 40
    assert view["changed"] == [" M livt_scale/deep/x.py"]
    assert "+x = 4" in (folder / "uncommitted.diff").read_text()
    subprocess.run([*git, "commit", "-q", "-a", "-m", "second"], check=True)
    assert keep_git_view(folder, checkout=checkout)["changed"] == []
    assert not (folder / "uncommitted.diff").exists()


def test_git_that_is_not_there_is_said(tmp_path, package, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert keep_git_view(tmp_path / "run", checkout=package.parent)["commit"] is None
