"""The report of one run: each part of it as text, whatever state the run is in, and text of others stays text."""

import json
import os
import re
import shutil

import pytest
from PIL import Image

from livt_scale.config.load import to_yaml
from livt_scale.config.recipe import Recipe
from livt_scale.evaluation.report import make_report
from livt_scale.study.report import at_end, run_sections
from livt_scale.study.report.at_end import write_at_end
from livt_scale.study.report.run_page import write_run_report
from livt_scale.study.report.run_record import read_run
from livt_scale.study.report.run_sections import sections_of_run
from livt_scale.util.errors import RunError, UsageError
from tests.evaluation.made import COUNTS, NAMES, outputs
from tests.tiny_run import tiny_recipe, tiny_run

SECTIONS = ["curves", "groups", "classes", "confusion", "calibration", "reconstructions", "speed", "lineage", "recipe"]


def lines_of(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def trained(folder, stage, *, steps=300, state="done", why=""):
    """The files that a stage leaves while it trains."""
    lines = [{"step": s, "epoch": s / 15, "loss": 2 - s / 300, "lr": 1e-3, "images_per_s": 100.0 + s, "step_s": 0.5,
              "data_wait_s": 0.05, "world_size": 2, "memory_peak_gib": 1.5} for s in range(1, steps + 1)]  # fmt: skip
    lines_of(folder / stage / "metrics.jsonl", lines)
    status = {"state": state, "why": why, "step": steps, "total_steps": 300, "starts": 2}
    (folder / stage / "status.json").write_text(json.dumps(status))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Both stages, an evaluation with a temperature, and names of classes that are markup."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    recipe = tiny_recipe(val="val")
    stages = {"pretrain": {"global_batch": 8, "micro_batch": 8}, "finetune": {"global_batch": 8, "micro_batch": 8}}
    recipe = Recipe.model_validate(recipe.model_dump(exclude={"stages"}) | {"stages": stages})
    tiny_run(folder, recipe, class_names=NAMES, class_counts=COUNTS)
    trained(folder, "pretrain")
    trained(folder, "finetune")
    rows = [{"step": s, "epoch": s / 15, "top1_all": s / 400, "top1_many": 0.9, "top1_medium": None} for s in (75, 300)]
    lines_of(folder / "finetune" / "evaluations.jsonl", rows)
    report = make_report(outputs(), temperature=True).report
    (folder / "finetune" / "eval.json").write_text(json.dumps(report))
    (folder / "pretrain" / "samples").mkdir()
    Image.new("RGB", (60, 40)).save(folder / "pretrain" / "samples" / "step-00000300.png")
    return folder


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    return page_of(finished, tmp_path_factory.mktemp("page"))


def page_of(run, folder):
    return write_run_report(run, folder / "report.html").read_text()


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes seconds."""
    monkeypatch.setattr(run_sections, "png_uri", lambda _: "data:,")


def cells(page):
    """The texts of the table's cells."""
    return set(re.findall(r"<t[hd][^>]*><bdi>(.*?)</bdi></t[hd]>", page))


def test_each_part_is_there_and_nothing_is_missing(page):
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS
    assert "Not in this report" not in page
    assert page.count("data:image/png;base64,") == 5 + 3  # curves; classes, confusion, calibration
    assert page.count("data:image/webp;base64,") == 1
    assert "learning rate" in page
    assert "base_lr: " in page


def test_what_pictures_show_is_text_too(finished, page):
    report = json.loads((finished / "finetune" / "eval.json").read_text())
    shown = cells(page)
    for one in report["per_class"]:
        assert f"{100 * one['top1']:.1f} %" in shown
    for row in report["confusion"]:
        assert {f"{count:,}" for count in row} <= shown
    fitted = report["temperature"]
    for one in (*fitted["before"]["bins"], *fitted["after"]["bins"]):
        assert not one["images"] or f"{100 * one['accuracy']:.1f} %" in shown
    assert {"1.997", "1", "0.001", "18.8", "75"} <= shown  # losses, learning rate, evaluations in per cent


@pytest.mark.usefixtures("no_pictures")
def test_accuracies_have_intervals_and_speed_is_that_of_the_log(finished):
    sections = {section.id: section for section in sections_of_run(read_run(finished))}
    groups = {row[0]: row for row in sections["groups"].blocks[0].rows}
    value, interval = groups["all images"][4:6]
    low, high = map(float, re.findall(r"[\d.]+", interval))
    assert low < float(value.removesuffix(" %")) < high
    assert groups["few-shot classes, mean"][1] == "2"
    heads = [title for title, _ in sections["speed"].blocks[0].heads]
    row = dict(zip(heads, sections["speed"].blocks[0].rows[0], strict=True))
    expected = {"step": "0.500 s", "wait for data": "10.0 %", "MFU": "–", "ranks": "2", "time in steps": "2.5 min"}
    assert {name: row[name] for name in expected} == expected
    assert float(row["device hours"]) == pytest.approx(300 * 0.5 * 2 / 3600, rel=0.01)


def test_text_of_others_stays_text_and_the_page_runs_no_script(page):
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "two\\u{a}lines" in page
    assert "default-src 'none'; img-src data:" in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page)


@pytest.mark.usefixtures("no_pictures")
def test_an_unfinished_run_says_what_is_not_there_yet(tmp_path):
    recipe = tiny_recipe(val="val")
    tiny_run(tmp_path / "run", recipe, final=False, class_names=NAMES, class_counts=COUNTS)
    trained(tmp_path / "run", "finetune", steps=80, state="failed", why="NonFiniteError: <b>nan</b>")
    page = page_of(tmp_path / "run", tmp_path)
    assert "NonFiniteError: &lt;b&gt;nan" in page
    assert page.count("The final evaluation has not been written yet.") == 4
    assert "The run has no pretraining." in page
    assert "step 80 of 300" in page


def test_a_run_of_pretraining_alone_and_one_that_never_started(tmp_path):
    recipe = Recipe.model_validate(
        tiny_recipe().model_dump(exclude={"stages"}) | {"stages": {"pretrain": {"global_batch": 64}}}
    )
    (tmp_path / "run" / "pretrain").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(to_yaml(recipe))
    missing = {section.id: section.missing for section in sections_of_run(read_run(tmp_path / "run"))}
    assert missing["curves"] == missing["speed"] == "No step has been logged yet."
    assert missing["groups"] == "The run has no fine-tuning, so no classifier is evaluated."
    assert missing["reconstructions"] == "No picture has been saved yet."
    assert missing["recipe"] == ""


def test_what_is_no_run_and_a_damaged_evaluation_are_refused(finished, tmp_path):
    with pytest.raises(UsageError, match="not a run"):
        write_run_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(UsageError, match="is a folder"):
        write_run_report(finished, tmp_path)
    tiny_run(tmp_path / "run", tiny_recipe(), class_names=NAMES, class_counts=COUNTS)
    (tmp_path / "run" / "finetune" / "eval.json").write_text('{"per_class": [{"class": 0}]}')
    with pytest.raises(RunError, match="not a report of an evaluation"):
        write_run_report(tmp_path / "run", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_training_leaves_a_report_that_is_as_new_as_the_run_and_fails_nothing(finished, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    run, report = tmp_path / "run", tmp_path / "run" / "report.html"
    shutil.copytree(finished, run)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    write_at_end(run)
    assert not report.exists()
    monkeypatch.undo()
    write_at_end(run)
    assert report.stat().st_size > 10_000
    write_at_end(run)
    os.utime(report, ns=(1, 1))  # older than the status
    write_at_end(run)
    assert [record.getMessage() for record in caplog.records] == [f"report: {report}"] * 2
    assert report.stat().st_mtime_ns > 1

    report.write_text("mine")
    os.utime(report, ns=(1, 1))
    write_at_end(run)
    assert report.read_text() == "mine"
    report.unlink()
    monkeypatch.setattr(at_end, "write_run_report", lambda *_: 1 / 0)
    write_at_end(run)
    foreign, broken = (record.getMessage() for record in caplog.records[2:])
    assert foreign.startswith(f"no report: {report} is there already")
    assert broken.startswith("no report: ZeroDivisionError: ")
