"""`livt export` and `livt eval`, as typed: on a run, on its export, and on neither."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from livt_scale.cli.main import app
from livt_scale.util.errors import DataError, UsageError
from tests.tiny_run import tiny_recipe, tiny_run, tiny_shards

COUNTS = {"a": 4, "b b": 3, "c'c": 2}


def livt(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    val = tiny_shards(tmp_path / "data of 'val'", COUNTS)
    folder = tmp_path / 'run of "mine"\n'
    tiny_run(
        folder,
        tiny_recipe(train="gone", val=val.folder),
        scores={40: 0.9, 80: 0.1},
        class_names=tuple(COUNTS),
        class_counts=(300, 50, 3),
    )
    return folder


def test_a_run_and_its_export_are_evaluated_alike_without_the_training_data(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out put"
    exported = json.loads(livt("export", run_dir, "--out", out, "--json").stdout)
    assert exported["lineage"]["checkpoint"] == "step-00000080"
    of_run = json.loads(livt("eval", run_dir, "--json").stdout)
    val = of_run["data"]["folder"]
    of_export = json.loads(livt("eval", out, "--data", val, "--json").stdout)
    assert of_run["num_samples"] == 9
    assert set(of_run["top1"]) >= {"all", "many", "medium", "few"}
    assert of_run["weights"].pop("read_from") == str(run_dir)
    assert of_export["weights"].pop("read_from") == str(out)
    assert of_export == of_run


def test_another_checkpoint_than_the_final_one_is_named_in_the_report(run_dir: Path, tmp_path: Path) -> None:
    report = json.loads(livt("eval", run_dir, "--checkpoint", "best", "--json").stdout)
    assert report["weights"]["checkpoint"] == "step-00000040"
    said = livt("export", run_dir, "--checkpoint", "40").stdout
    assert "step-00000040" in said
    assert f"local-dir:{run_dir / 'export'}".replace("\n", "\\n") in said
    assert (run_dir / "export" / "model.safetensors").is_file()


def test_a_table_for_people_and_a_file_for_later(run_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "later" / "eval.json"
    said = livt("eval", run_dir, "--out", file).stdout
    assert "many" in said
    assert "step-00000080" in said
    saved = json.loads(file.read_text())
    assert saved["format"] == "livt-eval"
    assert saved["weights"]["position"] == {"epoch": 4, "step": 80}


def test_what_cannot_be_evaluated_is_said_in_one_line(run_dir: Path, tmp_path: Path) -> None:
    livt("export", run_dir, "--out", tmp_path / "out")
    with pytest.raises(UsageError, match="--data"):
        livt("eval", tmp_path / "out")
    with pytest.raises(UsageError, match="neither a run nor an export"):
        livt("eval", tmp_path)
    with pytest.raises(UsageError, match="is an export and has one set of weights"):
        livt("eval", tmp_path / "out", "--checkpoint", "best")
    other = tiny_shards(tmp_path / "other", {"a": 1, "z": 1})
    with pytest.raises(DataError, match=r"only in the first: 'z'; only in the second: 'b b', \"c'c\""):
        livt("eval", tmp_path / "out", "--data", other.folder)
