"""A run's temperature: fitted when fine-tuning ends, carried by its exports, applied to predictions."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import livt_scale as livt
from livt_scale.data.build.builder import build
from livt_scale.data.build.spec import load_spec
from livt_scale.evaluation.calibration import Calibration, recorded_calibration, temperature_report
from livt_scale.export.export_info import read_info
from livt_scale.export.write_export import export_run
from livt_scale.posthoc.evaluate_path import evaluate_path
from livt_scale.posthoc.predict import predict
from livt_scale.posthoc.soup import make_soup, read_members
from livt_scale.posthoc.tau_norm import tau_normalise


@pytest.fixture(scope="module")
def unsure_run(train_tiny, tiny_images, tiny_spec, tmp_path_factory):
    """A run, evaluated on a set in which a third of the labels are wrong: no model is right about all of it."""
    folder = tmp_path_factory.mktemp("unsure")
    shutil.copytree(tiny_images, folder / "img")
    shutil.copy(tiny_spec, folder)
    for one, other in (("cat", "dog"), ("eel", "fox")):
        for k in (0, 1):
            ours, theirs = (folder / "img" / "val" / name / f"{k:03}.jpg" for name in (one, other))
            swapped = ours.read_bytes(), theirs.read_bytes()
            theirs.write_bytes(swapped[0])
            ours.write_bytes(swapped[1])
    build(load_spec(folder / tiny_spec.name), folder / "sh", workers=1)
    sets = {"stages.pretrain": None, "stages.finetune.init": "scratch", "data.val": folder / "sh" / "val"}
    train_tiny(folder / "run", sets)
    return folder / "run"


def report_of(run: Path) -> dict:
    return json.loads((run / "finetune" / "eval.json").read_text())


def test_the_final_evaluation_fits_it_on_half_of_the_set_as_livt_eval_does(unsure_run):
    report = report_of(unsure_run)
    outputs = evaluate_path(unsure_run, keep=True).outputs
    assert outputs is not None
    assert report["temperature"] == temperature_report(outputs)
    assert (report["temperature"]["fitted_on"], report["temperature"]["reported_on"]) == (12, 12)


def test_run_and_export_predict_with_it_and_say_which(unsure_run, tiny_images, tmp_path, caplog):
    report, files = report_of(unsure_run), sorted((tiny_images / "val").rglob("*.jpg"))
    with caplog.at_level(logging.INFO, logger="livt_scale"):
        export_run(unsure_run, tmp_path / "export")
    [line] = [r.getMessage() for r in caplog.records if r.getMessage().startswith("export: ")]
    fitted = report["temperature"]["temperature"]
    assert f"temperature {fitted:.3f}, fitted on 12 held-out images of val" in line
    info = read_info(tmp_path / "export")
    assert info.calibration == Calibration(
        temperature=fitted, images=12, data="val", manifest_digest=report["data"]["manifest_digest"]
    )
    for path in (unsure_run, tmp_path / "export"):
        predictor, plain = livt.load(path), livt.load(path, temperature=1.0)
        assert predictor.temperature == fitted
        logits = plain(files).probabilities.double().log()
        torch.testing.assert_close(predictor(files).probabilities, (logits / fitted).softmax(1).float())

    summary = predict(livt.load(tmp_path / "export")._trained, tiny_images / "val", tmp_path / "out.csv")
    assert summary["temperature"] == fitted
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    found = predictor(files).probabilities.amax(1)
    assert [float(row["probability_1"]) for row in rows] == pytest.approx(found.tolist(), abs=1e-6)


def test_weights_that_eval_json_is_not_of_have_none_and_say_why(unsure_run, copy_of, tmp_path):
    run = copy_of(unsure_run)
    info = export_run(run, tmp_path / "other", which="4")
    assert info.calibration.temperature is None
    assert "eval.json is of step-00000008" in str(info.calibration.why)
    assert livt.load(tmp_path / "other").temperature == 1.0
    (run / "finetune" / "eval.json").write_text("[")
    assert "cannot be read" in str(export_run(run, tmp_path / "damaged").calibration.why)
    (run / "finetune" / "eval.json").unlink()
    assert "no finetune/eval.json" in str(export_run(run, tmp_path / "none").calibration.why)


def test_a_changed_model_gets_its_own(unsure_run, tmp_path):
    report = report_of(unsure_run)
    tau_normalise(unsure_run, tmp_path / "tau", taus=[1.0])
    make_soup(read_members([unsure_run], all_checkpoints=True), tmp_path / "soup", run=unsure_run)
    for made in ("tau", "soup"):
        outputs = evaluate_path(tmp_path / made, data=Path(report_of(unsure_run)["data"]["folder"]), keep=True).outputs
        assert outputs is not None
        own = livt.load(tmp_path / made).temperature
        assert own == pytest.approx(temperature_report(outputs)["temperature"], rel=1e-4)
        assert own != report["temperature"]["temperature"]


def part(**fields):
    return {"temperature": 0.5, "at_bound": False, "fitted_on": 7} | fields


REPORT = {
    "weights": {"checkpoint_digest": "a", "checkpoint": "step-1"},
    "views": {"number": 1},
    "data": {"name": "val", "manifest_digest": "d"},
    "temperature": part(),
    "ema": {"temperature": part(temperature=2.0)},
}


def test_what_an_eval_json_records_counts_for_the_very_weights_and_plain_logits():
    assert recorded_calibration(REPORT, checkpoint_digest="a").temperature == 0.5
    assert recorded_calibration(REPORT, checkpoint_digest="a", weights="ema").temperature == 2.0
    for change in (
        {"views": {"number": 10}},
        {"adjustment": {"tau": 1}},
        {"temperature": part(at_bound=True)},
        {"weights": {"checkpoint_digest": "b", "checkpoint": "step-2"}},
    ):
        assert recorded_calibration(REPORT | change, checkpoint_digest="a").temperature is None
    del (plain := dict(REPORT))["ema"]
    assert recorded_calibration(plain, checkpoint_digest="a", weights="ema").temperature is None


ANYTHING = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2))


@settings(max_examples=30)
@given(
    field=st.sampled_from(sorted(REPORT)),
    inner=st.sampled_from(["temperature", "at_bound", "fitted_on", "name"]),
    value=ANYTHING,
)
def test_a_report_of_any_contents_gives_a_positive_temperature_or_a_reason(field, inner, value):
    for report in (REPORT | {field: value}, REPORT | {field: {**dict(REPORT[field]), inner: value}}):
        found = recorded_calibration(report, checkpoint_digest="a")
        assert (found.temperature is None) == (found.why is not None)
        assert found.temperature is None or found.temperature > 0
