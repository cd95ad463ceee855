"""A command replaces what it wrote itself; what another run or a person wrote there, only with --force."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from livt_scale.cli.main import app
from livt_scale.export.write_export import export_run
from livt_scale.posthoc.tau_norm import tau_normalise
from livt_scale.study.definition import load_study
from livt_scale.study.study_folder import check_folder
from livt_scale.train.export_info import read_info
from livt_scale.util.errors import ExportError, UsageError
from livt_scale.util.outputs import check_output
from tests.tiny_run import tiny_recipe, tiny_run, tiny_shards

CLASSES = {"a": 9, "b": 6, "c": 3}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> tuple[Path, Path]:
    """Two runs of one recipe that learnt from different images, with one evaluation set."""
    folder = tmp_path_factory.mktemp("two")
    val = tiny_shards(folder / "val", CLASSES).folder
    for name, digest in (("one", "1" * 64), ("other", "2" * 64)):
        tiny_run(
            folder / name,
            tiny_recipe(train=val, val=val),
            steps=(40,),
            class_names=tuple(CLASSES),
            class_counts=tuple(CLASSES.values()),
            manifest_digest=digest,
        )
    return folder / "one", folder / "other"


def livt(*words: object) -> tuple[int, object]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.exception


PLAN = ("plan", "livt:fashion_mnist_lt/quickstart", "--gpus", 2, "--images", 2478, "--classes", 10)
PAGES = [("recipe", "list", "--page"), ("reproduce", "losses", "--collect-only", "--out", "nothing", "--page")]


@pytest.mark.parametrize("words", [(*PLAN, "--picture"), *PAGES], ids=["plan", "recipe list", "reproduce"])
def test_a5_a_picture_or_page_does_not_replace_what_something_else_wrote(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.png").write_bytes(b"\x89PNG of a holiday")
    _, error = livt(*words, "mine.png")
    assert isinstance(error, UsageError)
    assert "--force" in error.remedy
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"\x89PNG of a holiday"]


@pytest.mark.parametrize("words", PAGES, ids=["recipe list", "reproduce"])
def test_a5_a_page_replaces_its_own_earlier_one(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.md").write_text("notes")
    assert livt(*words, "mine.md", "--force") == (0, None)
    written = Path("mine.md").read_text()
    assert livt(*words, "mine.md") == (0, None)
    assert Path("mine.md").read_text() == written != "notes"


def test_a5_the_export_of_another_run_is_replaced_only_with_force(two_runs, tmp_path):
    one, other = two_runs
    out = tmp_path / "photos"
    export_run(one, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    export_run(one, out)  # again: the same bytes
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(ExportError, match="holds another export: step-00000040 of run") as refused:
        export_run(other, out)
    assert "--force" in refused.value.remedy
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert livt("export", other, "--out", out, "--force")[0] == 0
    assert read_info(out).lineage["run"] != json.loads(before["config.json"])["livt"]["lineage"]["run"]


def test_a5_a_changed_head_does_not_replace_the_export_as_trained(two_runs, tmp_path):
    one, _ = two_runs
    export_run(one, tmp_path / "as-trained")
    with pytest.raises(ExportError, match="holds another export"):
        tau_normalise(one, tmp_path / "as-trained", taus=[1.0])
    tau_normalise(one, tmp_path / "tau", taus=[1.0])
    tau_normalise(one, tmp_path / "tau", taus=[0.5])
    with pytest.raises(ExportError, match=r"by tau-norm"):
        export_run(one, tmp_path / "tau")


@pytest.mark.parametrize("layout", ["mae", "hf"])
def test_a5_other_layouts_replace_nothing_without_force(two_runs, tmp_path, layout):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo.jpg").write_bytes(b"x")
    stage = ("--stage", "finetune") if layout == "mae" else ()
    for words in ((), ("--force",)):
        code, error = livt("export", two_runs[0], "--to", layout, *stage, "--out", tmp_path / "out", *words)
        assert code != 0
        assert isinstance(error, ExportError)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["photo.jpg"]


@pytest.mark.parametrize(
    ("option", "own"),
    [
        ("--out", b'{\n  "format": "livt-eval",\n'),
        ("--save-logits", b'\x00{"__metadata__":{"livt":"{\\"format\\": \\"livt-logits\\""}}'),
        ("--gallery", b"<!DOCTYPE html>\n<title>The worst confusions</title>"),
        ("--reports", b"class,name,group,train_images\n"),
    ],
)
def test_a5_eval_replaces_no_file_that_it_did_not_write(two_runs, tmp_path, option, own):
    file = tmp_path / "per_class.csv"
    place = tmp_path if option == "--reports" else file
    file.write_bytes(b"my labels\n")
    _code, error = livt("eval", two_runs[0], option, place)
    assert isinstance(error, UsageError)
    assert "livt eval did not write it" in str(error)
    assert file.read_bytes() == b"my labels\n"
    file.write_bytes(own)
    check_output(file, marks=[own[-12:]], command="eval", force=False)


def test_a5_eval_replaces_the_report_of_another_run_only_with_force(two_runs, tmp_path):
    one, other = two_runs
    out = tmp_path / "eval.json"
    assert livt("eval", one, "--out", out)[0] == 0
    report = out.read_bytes()
    _code, error = livt("eval", other, "--out", out)
    assert isinstance(error, UsageError)
    assert "is the report on another run" in str(error)
    assert out.read_bytes() == report
    assert livt("eval", one, "--out", out)[0] == 0
    assert livt("eval", other, "--out", out, "--force")[0] == 0


def test_a5_predict_replaces_no_table_that_it_did_not_write(two_runs, tiny_images, tmp_path):
    labels = tmp_path / "photos.csv"
    labels.write_text("file,label\n")
    _code, error = livt("predict", two_runs[0], tiny_images / "val", "--out", labels)
    assert isinstance(error, UsageError)
    assert labels.read_text() == "file,label\n"
    labels.write_bytes(b"file,error,number_1,class_1\n")
    check_output(labels, marks=[b"file,error,number_1,"], command="predict", force=False)


def test_a5_a_study_is_not_laid_over_another_one(tmp_path, tiny_recipe):
    for name in ("sizes", "losses"):
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\nrecipe: {tiny_recipe}\naxes: {{seed: [0, 1]}}\n")
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "study.yaml").write_text((tmp_path / "sizes.yaml").read_text())
    check_folder(load_study(tmp_path / "sizes.yaml", folder=folder))
    with pytest.raises(UsageError, match="holds another study"):
        check_folder(load_study(tmp_path / "losses.yaml", folder=folder))


@pytest.mark.parametrize("command", ["status", "collect", "fit", "compare", "crossing", "report"])
def test_a5_no_command_of_a_study_writes_into_the_folder_of_another_one(tmp_path, tiny_recipe, command):
    for name in ("sizes", "losses"):
        (tmp_path / f"{name}.yaml").write_text(f"name: {name}\nrecipe: {tiny_recipe}\naxes: {{seed: [0, 1]}}\n")
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "study.yaml").write_text((tmp_path / "sizes.yaml").read_text())
    (folder / "table.json").write_text("of sizes")
    _code, error = livt("study", command, tmp_path / "losses.yaml", "--out", folder)
    assert isinstance(error, UsageError)
    assert "holds another study" in str(error)
    assert (folder / "table.json").read_text() == "of sizes"


def test_a4_a_study_in_another_folder_starts_no_second_one(tmp_path, tiny_recipe, monkeypatch):
    (tmp_path / "sizes.yaml").write_text(f"name: sizes\nrecipe: {tiny_recipe}\naxes: {{seed: [0, 1]}}\n")
    runs = tmp_path / "runs" / "studies" / "sizes"
    runs.mkdir(parents=True)
    (runs / "study.yaml").write_text((tmp_path / "sizes.yaml").read_text())
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(UsageError, match="would be a second one beside"):
        check_folder(load_study(Path("../sizes.yaml")))
    check_folder(load_study(Path("../sizes.yaml"), folder=tmp_path / "other" / "sizes"))


def test_a5_a_file_that_is_no_regular_file_is_not_read(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is not a regular file"):
        check_output(tmp_path / "pipe", marks=[b"x"], command="eval", force=False)
