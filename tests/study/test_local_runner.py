"""The runner with `livt` replaced by small programs; one test trains for real."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from livt_scale.study import local_runner
from livt_scale.study.local_runner import check_runs, run_all
from livt_scale.study.runs import Run
from livt_scale.util.errors import Preempted, RecipeError
from tests.data.tiny_sets import tiny_set

# Stands for `python -m livt_scale train …`: writes what a run leaves, or fails where its folder has a file "breaks".
PROGRAM = """
import json, os, pathlib, sys, time
place = pathlib.Path(next(w for w in sys.argv if w.startswith("--set=run_dir=")).split("=", 2)[2])
stage = sys.argv[sys.argv.index("--stage") + 1]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(f"{place.name} {stage} {(place / 'pretrain').is_dir()}\\n")
if (place / "breaks").exists():
    sys.exit("planted: no such loss")
time.sleep(float(os.environ.get("TAKES", "0")))
(place / stage).mkdir(exist_ok=True)
(place / stage / "status.json").write_text(json.dumps({"state": "done"}))
(place / stage / "weights").write_text(place.name)
"""


@pytest.fixture
def livt(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    real = subprocess.Popen

    def popen(words, **named):
        assert words[:3] == [sys.executable, "-m", "livt_scale"]
        return real([sys.executable, str(tmp_path / "program.py"), *words[3:]], **named)

    monkeypatch.setattr(local_runner.subprocess, "Popen", popen)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []


def grid():
    return [Run("p", Path("r"), stage="pretrain"), *(Run(n, Path("r"), after="p") for n in "abc"), Run("d", Path("r"))]


def test_pretraining_first_then_each_from_a_copy_of_it_and_nothing_twice(livt, tmp_path):
    outcome = run_all(grid(), tmp_path)
    assert sorted(outcome.done) == ["a", "b", "c", "d", "p"]
    assert livt()[0] == "p pretrain False"
    assert {"a finetune True", "b finetune True", "c finetune True", "d finetune False"} < set(livt())
    (tmp_path / "a" / "pretrain" / "weights").unlink()  # each has its own
    assert (tmp_path / "p" / "pretrain" / "weights").read_text() == "p"
    run_all(grid(), tmp_path)
    assert len(livt()) == 5


def test_one_that_fails_is_named_with_its_log_and_what_starts_from_it_waits_and_the_others_go_on(livt, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "breaks").touch()
    outcome = run_all(grid(), tmp_path)
    assert outcome.done == ["d"]
    assert "planted: no such loss" in outcome.failed["p"]
    assert str(tmp_path / "p" / "output.txt") in outcome.failed["p"]
    assert sorted(outcome.waited) == ["a", "b", "c"]


def test_a_teacher_comes_before_the_run_that_it_teaches(livt, tmp_path):
    taught = [Run("vit", Path("r"), teacher="cnn"), Run("cnn", Path("r"))]
    assert run_all(taught, tmp_path, jobs=2).done == ["cnn", "vit"]
    assert [call.split()[0] for call in livt()] == ["cnn", "vit"]
    (tmp_path / "cnn" / "finetune" / "status.json").unlink()
    (tmp_path / "cnn" / "breaks").touch()
    (tmp_path / "vit" / "finetune" / "status.json").unlink()
    assert run_all(taught, tmp_path, jobs=2).waited == ["vit"]


def test_a_teacher_that_is_still_to_be_trained_is_no_problem_and_another_one_is(tmp_path):
    tiny_set(tmp_path / "set")
    recipe = tmp_path / "r.yaml"
    finetune = "init: scratch, layer_decay: 1, epochs: 1, warmup_epochs: 0, global_batch: 8, micro_batch: 8"
    recipe.write_text(
        f"name: r\ndata: {{train: {tmp_path / 'set'}}}\nmodel: {{size: vit_micro, image_px: 32}}\n"
        f"stages: {{finetune: {{{finetune}, loss: {{name: ce}}}}}}\n"
    )
    cnn = Run("cnn", recipe, {"model.size": "resnet_micro", "stages.finetune.drop_path": 0})
    taught = Run("vit", recipe, teacher="cnn")
    check_runs([cnn, taught], tmp_path / "runs")
    (tmp_path / "runs" / "cnn").mkdir(parents=True)  # begun
    check_runs([cnn, taught], tmp_path / "runs")
    with pytest.raises(RecipeError, match=r"stages\.finetune\.distill\.teacher"):
        check_runs([taught], tmp_path / "runs")


def test_no_more_than_so_many_at_once(livt, tmp_path, monkeypatch):
    monkeypatch.setenv("TAKES", "0.3")
    began = time.monotonic()
    run_all([Run(n, Path("r")) for n in "abcd"], tmp_path, jobs=2)
    assert time.monotonic() - began > 0.6


def test_a_signal_stops_the_runs_too_and_they_are_continued(livt, tmp_path, monkeypatch):
    monkeypatch.setenv("TAKES", "60")
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with pytest.raises(Preempted, match="stopped by SIGTERM"):
        run_all(grid(), tmp_path, jobs=2)
    assert time.monotonic() - began < 30, "it waited for nobody who would not stop"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setenv("TAKES", "0")
    assert sorted(run_all(grid(), tmp_path).done) == ["a", "b", "c", "d", "p"]


@pytest.mark.slow
def test_a_claim_is_killed_continued_and_judged(tmp_path):
    """The whole command, on the shards that ship: two seeds of one epoch, killed once in the middle."""
    root = Path(__file__).resolve().parents[2]
    sets = [
        f"data.train={root}/shards/fashion-mnist-lt/train-lt", f"data.val={root}/shards/fashion-mnist-lt/val",
        "data.many_over=100", "data.few_under=20", "stages.*.epochs=2", "stages.*.warmup_epochs=0",
    ]  # fmt: skip
    words = [sys.executable, "-m", "livt_scale", "reproduce", "losses", "--seeds=1", f"--out={tmp_path}", "--json"]
    words += [f"--set={s}" for s in sets]
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "fashion_mnist_lt" / "bal_bce" / "seed-0" / "finetune" / "status.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=600)
    (result,) = json.loads(done.stdout)
    assert result["word"] == "not decidable here", "one seed decides nothing"
    assert not result["missing"]
    assert all(0 < of["top1_all"]["0"] < 1 for of in result["values"].values())
