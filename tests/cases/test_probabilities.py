"""A run's temperature: fitted when fine-tuning ends, carried by its exports, applied to predictions."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import logging
import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import livt_scale as livt
from livt_scale.cli.main import app
from livt_scale.config.recipe import Recipe
from livt_scale.data.build.builder import build
from livt_scale.data.build.spec import load_spec
from livt_scale.data.image.transforms import EvalTransform
from livt_scale.data.settings import ImageSettings
from livt_scale.evaluation.calibration import NOT_FITTED, Calibration, recorded_calibration, temperature_report
from livt_scale.export.onnx import TOLERANCE, PixelsToProbabilities, compare_with_onnxruntime, export_onnx
from livt_scale.export.write_export import export_run
from livt_scale.posthoc.evaluate_path import evaluate_path
from livt_scale.posthoc.predict import predict
from livt_scale.posthoc.soup import make_soup, read_members
from livt_scale.posthoc.tau_norm import tau_normalise
from livt_scale.train.export_info import read_info
from livt_scale.train.load_trained import load_trained
from livt_scale.train.open_trained import open_trained
from livt_scale.util.errors import ExportError, UsageError
from tests.tiny_run import tiny_recipe as a_recipe
from tests.tiny_run import tiny_run


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


@pytest.fixture(scope="module")
def onnx_export(unsure_run, tmp_path_factory):
    """What `livt export --to onnx` writes."""
    out = tmp_path_factory.mktemp("onnx") / "out"
    assert CliRunner().invoke(app, ["export", str(unsure_run), "--to", "onnx", "--out", str(out)]).exit_code == 0
    return out


@pytest.mark.slow  # an ONNX export takes 5 s
def test_onnx_takes_pixels_and_gives_the_predictors_probabilities(unsure_run, onnx_export, tiny_images):
    session = onnxruntime.InferenceSession(onnx_export / "model.onnx")
    files, predictor = sorted((tiny_images / "val").rglob("*.jpg")), livt.load(unsure_run)
    settings = ImageSettings.of_recipe(open_trained(unsure_run).recipe)
    pixels = torch.empty((len(files), 16, 16, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    for file, slot in zip(files, pixels, strict=True):
        EvalTransform(settings).crops(file.read_bytes(), slot[None])
    for count in (len(files), 1):
        [found] = session.run(["probabilities"], {"images": np.ascontiguousarray(pixels[:count])})
        torch.testing.assert_close(
            torch.from_numpy(found), predictor(files[:count]).probabilities, rtol=0, atol=TOLERANCE
        )


@pytest.mark.slow  # an ONNX export takes 5 s
def test_onnx_says_of_which_run_checkpoint_and_set_it_is(unsure_run, onnx_export, tmp_path):
    info = read_info(onnx_export)
    own = json.loads(onnx.load(onnx_export / "model.onnx").metadata_props[0].value)
    assert own == {k: v for k, v in info.model_dump(mode="json").items() if k != "weights"}
    assert own["lineage"] == export_run(unsure_run, tmp_path / "timm").lineage
    assert (info.weights.name, info.calibration.images) == ("model.onnx", 12)
    assert sha256((onnx_export / "model.onnx").read_bytes()).hexdigest() == info.weights.sha256
    assert str(unsure_run.parent).encode() not in (onnx_export / "model.onnx").read_bytes()


@pytest.mark.slow  # an ONNX export takes 5 s
def test_onnx_and_timm_do_not_replace_each_other_unasked(unsure_run, onnx_export, tmp_path):
    shutil.copytree(onnx_export, tmp_path / "out")
    with pytest.raises(ExportError, match="another layout"):
        export_run(unsure_run, tmp_path / "out")
    with pytest.raises(ExportError, match="for onnxruntime"):
        livt.load(tmp_path / "out")
    export_run(unsure_run, tmp_path / "out", force=True)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.slow  # an ONNX export takes 5 s
def test_an_onnx_graph_with_other_probabilities_is_refused(unsure_run, onnx_export):
    trained = open_trained(unsure_run)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    compare_with_onnxruntime(PixelsToProbabilities(trained), onnx_export / "model.onnx", images=images)
    other = PixelsToProbabilities(dataclasses.replace(trained, calibration=NOT_FITTED))
    with pytest.raises(ExportError, match="differ by"):
        compare_with_onnxruntime(other, onnx_export / "model.onnx", images=images)


def test_what_onnx_needs_and_is_not_installed_is_named(unsure_run, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="onnx and onnxscript"):
        export_onnx(open_trained(unsure_run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", [{"size": "resnet_micro"}, {"size": "vit_h", "width": 80, "heads": 5}], ids=str)
def test_onnx_of_other_models_is_the_same_bytes_each_time_in_one_file_or_two(tmp_path, monkeypatch, model):
    tiny_run(tmp_path / "run", a_recipe(**model), steps=(40,))
    trained = load_trained(tmp_path / "run")
    for out in ("one", "again"):
        export_onnx(trained, tmp_path / out)
    assert (tmp_path / "one/model.onnx").read_bytes() == (tmp_path / "again/model.onnx").read_bytes()
    monkeypatch.setattr("livt_scale.export.onnx.ONE_FILE_BYTES", 1000)
    info = export_onnx(trained, tmp_path / "two")
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["config.json", "model.onnx", "model.onnx.data"]
    assert info.weights.name == "model.onnx.data"


@pytest.mark.slow
def test_onnx_of_a_model_with_prompts_takes_any_number_of_images(tmp_path):
    tree = a_recipe().model_dump()
    tree["stages"]["finetune"] |= {"train": "vpt", "init": "weights", "weights": "w"}
    tiny_run(tmp_path / "run", Recipe.model_validate(tree), steps=(40,))
    trained = load_trained(tmp_path / "run")
    assert trained.tuning.name == "vpt"
    export_onnx(trained, tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for count in (1, 2, 5):
        pixels = np.zeros((count, *session.get_inputs()[0].shape[1:]), dtype=np.uint8)
        assert session.run(["probabilities"], {"images": pixels})[0].shape[0] == count


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
