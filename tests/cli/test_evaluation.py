"""`livt eval` with its reports, as typed: of a run, of saved logits, of ranks, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from livt_scale.cli.main import app
from livt_scale.util.errors import DataError, UsageError
from tests.tiny_run import tiny_recipe, tiny_run, tiny_shards
from tests.whole_runs import REPO, Livt

COUNTS = {"a": 6, "b b": 5, "<c>'c": 4}


def livt(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)


def told(*args: str | Path) -> dict:
    return json.loads(livt("eval", *args, "--json").stdout)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    val = tiny_shards(tmp_path / "data of 'val'", COUNTS)
    folder = tmp_path / 'run of "mine"\n'
    tiny_run(
        folder,
        tiny_recipe(train="gone", val=val.folder),
        class_names=tuple(COUNTS),
        class_counts=(300, 50, 3),
    )
    return folder


def test_saved_logits_give_the_reports_of_the_run_without_it(run_dir: Path, tmp_path: Path) -> None:
    saved, first, second = tmp_path / "l.safetensors", tmp_path / "reports 1", tmp_path / "reports 2"
    wanted = ("--tau", "auto", "--temperature", "--gallery")
    of_run = told(run_dir, *wanted, first / "g.html", "--reports", first, "--save-logits", saved)
    run_dir.rename(tmp_path / "moved away")
    of_file = told(saved, *wanted, second / "g.html", "--reports", second)
    assert of_file == of_run
    assert of_run["num_samples"] == 7
    names = sorted(p.name for p in first.iterdir())
    assert names == ["g.html", "per_class.csv", "per_class.png", "reliability.png"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    rows = list(csv.DictReader(io.StringIO((first / "per_class.csv").read_bytes().decode(), newline="")))
    assert [row["name"] for row in rows] == list(COUNTS)
    for name in ("per_class.png", "reliability.png"):
        with Image.open(first / name) as picture:
            picture.load()


def test_plain_figures_stay_as_they_were_when_logits_are_kept(run_dir: Path, tmp_path: Path) -> None:
    assert told(run_dir, "--save-logits", tmp_path / "l.safetensors") == told(run_dir)
    assert told(tmp_path / "l.safetensors") == told(run_dir)


def test_a_sweep_is_a_table_and_a_row_for_each_tau(run_dir: Path, tmp_path: Path) -> None:
    report = told(run_dir, "--tau", "0,0.5,1")
    assert [row["tau"] for row in report["tau_sweep"]] == [0, 0.5, 1]
    assert report["tau_sweep"][0]["top1"] == report["top1"]
    one = told(run_dir, "--tau", "1")
    assert one["top1"] == report["tau_sweep"][2]["top1"]
    assert one["adjustment"]["formula"] == "z - tau * (log(prior) - log(1 - prior))"  # bal_bce
    out = tmp_path / "eval.json"
    said = livt("eval", run_dir, "--tau", "0,0.5", "--temperature", "--views", "2", "--out", out).stdout
    assert "τ" in said
    assert "fitted on 8 images; on the other 7" in said
    assert "views: 2, mean of logits" in said
    assert set(json.loads(out.read_text())) >= {"tau_sweep", "temperature", "views", "weights"}


def test_options_without_effect_and_wrong_ones_are_refused_before_the_model_runs(run_dir: Path, tmp_path: Path) -> None:
    saved = tmp_path / "l.safetensors"
    livt("eval", run_dir, "--save-logits", saved)
    for words in (
        ("--views", "2"),
        ("--batch", "3"),
        ("--checkpoint", "best"),
        ("--data", "x"),
        ("--average", "probs"),
    ):
        with pytest.raises(UsageError, match=rf"{words[0]}: no effect"):
            livt("eval", saved, *words)
    with pytest.raises(UsageError, match="--average has no effect on one view"):
        livt("eval", run_dir, "--average", "probs")
    for wrong in ("--tau=x", "--views=3", "--average=mean"):
        with pytest.raises(UsageError):
            livt("eval", run_dir, wrong)
    (tmp_path / "other.txt").write_text("no logits")
    with pytest.raises(DataError, match="not a file of logits"):
        livt("eval", tmp_path / "other.txt")


def test_a_gallery_of_saved_logits_finds_a_moved_set_where_it_is_told(run_dir: Path, tmp_path: Path) -> None:
    saved, page = tmp_path / "l.safetensors", tmp_path / "g.html"
    livt("eval", run_dir, "--save-logits", saved)
    folder = Path(told(saved)["data"]["folder"])
    folder.rename(tmp_path / "moved")
    with pytest.raises(DataError):
        livt("eval", saved, "--gallery", page)
    assert "gallery: " in livt("eval", saved, "--gallery", page, "--data", tmp_path / "moved").stdout
    assert "&lt;c&gt;" in page.read_text()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """On the real shards that ship, as typed under torchrun."""
    run = tmp_path / "run"
    val = REPO / "shards/fashion-mnist-lt/val"
    names = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
    tiny_run(run, tiny_recipe(train="gone", val=val), class_names=names, class_counts=tuple(range(1000, 0, -100)))
    words = (
        "eval",
        str(run),
        "--views",
        "10",
        "--tau",
        "auto",
        "--temperature",
        "--json",
        "--batch",
        "50",
    )  # alike on both
    one, two = (
        json.loads(Livt(tmp_path).run(*words, processes=n, expect=0).stdout.strip().splitlines()[-1]) for n in (1, 2)
    )
    assert one == two
    assert one["num_samples"] == 500
