"""scripts/compare.py: equal is equal bit for bit, and two revisions are really two."""

import json
import math
import subprocess
import sys
from pathlib import Path

from scripts import compare

# A package that "trains": its revision's loss, on the shards and for the seed that it was told.
FAKE = """
import json, pathlib, sys
sets = dict(text.split("=", 1) for flag, text in zip(sys.argv, sys.argv[1:]) if flag == "--set")
run = pathlib.Path(sets["run_dir"])
for stage in ("pretrain", "finetune"):
    (run / stage).mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": LOSS / (step + 1)}) for step in range(3)]
    (run / stage / "metrics.jsonl").write_text("\\n".join(lines))
"""


def revision(folder, loss):
    (folder / "livt_scale").mkdir(exist_ok=True)
    (folder / "livt_scale/__init__.py").write_text("")
    (folder / "livt_scale/__main__.py").write_text(FAKE.replace("LOSS", repr(loss)))
    git = [
        "git",
        "-C",
        str(folder),
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@example.org",
        "-c",
        "commit.gpgsign=false",
    ]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "a revision"]):
        subprocess.run([*git, *command], check=True)


def test_losses_are_equal_only_bit_for_bit():
    a = {("pretrain", 0): 0.1, ("pretrain", 1): math.nan, ("finetune", 0): 0.0}
    assert compare.differences(a, dict(a)) == []
    b = {**a, ("pretrain", 0): math.nextafter(0.1, 1)}
    (found,) = compare.differences(a, b)
    assert (found.stage, found.step) == ("pretrain", 0)
    assert 0 < found.relative < 1e-15
    assert "1 of 3 losses differ" in compare.table([found], num_steps=3)


def test_a_step_that_only_one_has_is_a_difference():
    (found,) = compare.differences({("pretrain", 0): 1.0}, {})
    assert (found.a, found.b, found.relative) == (1.0, None, math.inf)
    assert compare.report({}, {}, file=None) == 2


def test_two_revisions_are_trained_each_by_its_own_code(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "it's a clone"
    folder.mkdir()
    revision(folder, 1.5)
    revision(folder, 1.25)
    (folder / "livt_scale/__main__.py").write_text(FAKE.replace("LOSS", "1.5"))  # not committed
    monkeypatch.chdir(folder)
    out = tmp_path / "out.json"
    assert compare.main(["HEAD~1", ".", "--json", str(out)]) == 0
    assert "equal bit for bit: 6 losses" in capsys.readouterr().out
    assert json.loads(out.read_text()) == {"num_steps": 6, "differences": []}
    assert compare.main(["HEAD~1", "HEAD"]) == 1
    assert "6 of 6 losses differ" in capsys.readouterr().out
    worktrees = subprocess.run(["git", "worktree", "list"], check=True, capture_output=True, text=True).stdout
    assert len(worktrees.splitlines()) == 1  # nothing is left


def test_a_revision_that_is_not_there_is_wrong_usage(tmp_path, monkeypatch, capsys):
    revision(tmp_path, 1.0)
    monkeypatch.chdir(tmp_path)
    assert compare.main(["no-such-revision", "."]) == 2
    assert "exit code" in capsys.readouterr().err


def test_it_starts_as_a_script():
    script = Path(compare.__file__)
    result = subprocess.run([sys.executable, str(script), "--help"], check=True, capture_output=True, text=True)
    assert "--recipe" in result.stdout
