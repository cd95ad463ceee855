"""TensorBoard's files: groups of curves, recipe, hyper-parameters and pictures, in one run however often resumed."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from accelerate.tracking import TensorBoardTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

from livt_scale.config.load import load_recipe
from livt_scale.train.telemetry.tensorboard import grouped
from livt_scale.train.telemetry.trackers import open_trackers
from livt_scale.util.resources import shipped

RECIPE = load_recipe(shipped("recipes/fashion_mnist_lt/quickstart.yaml"))
LINE = {
    "step": 20, "epoch": 0.5, "loss": 0.5, "lr": 1e-3, "images_per_s": 9.0, "data_wait_s": 0.1, "step_s": 0.2,
    "mfu": None, "memory_peak_gib": 1.0, "world_size": 2, "time": "2026-01-01T00:00:00+00:00",
    "layers": {"head": {"grad_norm": 2.0}},
}  # fmt: skip


def test_each_field_of_a_line_has_its_group():
    assert {group: list(fields) for group, fields in grouped(LINE).items()} == {
        "train": ["epoch", "loss", "lr", "layers"],
        "time": ["data_wait_s", "step_s"],
        "system": ["images_per_s", "mfu", "memory_peak_gib"],
    }


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """Of a stage that was stopped after step 40 and resumed from step 20."""
    run_dir = tmp_path_factory.mktemp("run")
    Image.fromarray(np.full((6, 9, 3), 200, dtype=np.uint8)).save(run_dir / "picture.png")
    for begin, end in ((0, 40), (20, 60)):
        opened = open_trackers(RECIPE, "pretrain", run_dir=run_dir, start_step=begin, sent_to=0)
        for step in range(begin + 20, end + 1, 20):
            opened.log(grouped({**LINE, "loss": float(step)}), step=step)
        opened.log({"eval": {"top1_all": 0.25}}, step=end)
        opened.picture("reconstructions", run_dir / "picture.png", step=end)
        opened.finish()
    read = EventAccumulator(str(run_dir / "pretrain" / "tensorboard"))
    read.Reload()
    return read


@pytest.mark.parametrize("refused", [(TensorBoardTracker, "start"), (SummaryWriter, "add_text")])
def test_a_disk_that_is_full_when_a_stage_begins_is_one_warning(refused, tmp_path, monkeypatch, caplog):
    def no_space(*_args, **_named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*refused, no_space)
    opened = open_trackers(RECIPE, "pretrain", run_dir=tmp_path, start_step=0, sent_to=0)
    opened.log(grouped(LINE), step=20)
    opened.finish()
    where = tmp_path / "pretrain/tensorboard"
    assert caplog.messages == [
        f"{where} cannot be written: No space left on device; training continues, later curves are missing"
    ]


def test_curves_are_in_groups_and_repeated_steps_are_there_once(events):
    assert {"train/loss", "train/layers/head/grad_norm", "eval/top1_all", "time/step_s", "system/images_per_s"} <= set(
        events.Tags()["scalars"]
    )
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(20, 20.0), (40, 40.0), (60, 60.0)]


def test_the_recipe_its_fields_and_pictures_are_there(events):
    text = events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "mask_ratio: 0.75" in text
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    fields = plugin_data_pb2.HParamsPluginData.FromString(hparams).session_start_info.hparams
    assert fields["stages.pretrain.mask_ratio"].number_value == 0.75
    assert [(i.width, i.height) for i in events.Images("reconstructions")] == [(9, 6)]
