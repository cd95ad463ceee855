"""Saved logits: they come back as they were, give the same report, and a file that is not whole is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from livt_scale.distributed.world import World
from livt_scale.evaluation.logits import Outputs, gather, load_outputs, save_outputs
from livt_scale.losses import LOSSES
from livt_scale.metrics import Tally
from livt_scale.util.errors import DataError, RunError
from tests.evaluation.made import COUNTS, outputs
from tests.tiny_run import tiny_shards


def test_they_come_back_as_they_were_and_the_file_is_the_same_each_time(tmp_path: Path) -> None:
    made = outputs(50)
    one, two = tmp_path / "a folder" / "one.safetensors", tmp_path / "two.safetensors"
    save_outputs(made, one)
    save_outputs(made, two)
    assert one.read_bytes() == two.read_bytes()
    back = load_outputs(one)
    assert torch.equal(back.logits, made.logits)
    assert torch.equal(back.labels, made.labels)
    assert (back.keys, back.about) == (made.keys, made.about)
    assert back.report() == made.report()


def test_the_report_is_that_of_the_tally_whatever_is_shifted_and_scaled() -> None:
    made = outputs(5000)
    tally = Tally(5)
    tally.update(made.logits, made.labels)
    figures = tally.report(COUNTS, many_over=100, few_under=20)
    assert made.report() == {**figures, **made.about.facts}
    shift = torch.tensor([0.0, 1.0, -2.0, 0.5, 3.0])
    whole = made.with_logits((made.logits + shift) * 0.5)
    assert made.report(shift=shift, scale=0.5) == whole.report()


def test_a_file_that_is_cut_or_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "l.safetensors"
    save_outputs(outputs(10), path)
    whole = path.read_bytes()
    for broken in (b"", whole[:100], whole[:-1], b"\x80\x04\x95junk", b"\xff" * 8 + whole[8:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"l\.safetensors is not a file of logits"):
            load_outputs(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_outputs(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "another format"),
        ({"version": 2}, "another format"),
        ({"class_counts": [1, 2]}, "2 class_counts for 5 class_names"),
        ({"class_counts": [1, 2, 3, 4, -5]}, "numbers of images"),
        ({"class_names": [1, 2, 3, 4, 5]}, "must be text"),
        ({"class_names": 5}, "not iterable"),
        ({"logit_scale": 0}, "logit_scale is 0"),
        ({"facts": 3}, "class_counts for"),
        ({"extra": 3}, "extra"),
    ],
)
def test_metadata_that_cannot_be_is_told(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "l.safetensors"
    save_outputs(outputs(10), path)
    head, tensors = read(path)
    save_file(tensors, path, metadata={"livt": json.dumps({**head, **change})})
    with pytest.raises(DataError, match=message):
        load_outputs(path)


def test_tensors_that_cannot_be_are_told(tmp_path: Path) -> None:
    path = tmp_path / "l.safetensors"
    save_outputs(outputs(10), path)
    head, good = read(path)
    nan = good["logits"].clone()
    nan[3, 2] = float("nan")
    for change, message in (
        ({"labels": good["labels"] + 1}, r"labels from \d to 5 for 5 classes"),
        ({"labels": good["labels"][:9]}, "for 10 keys"),
        ({"logits": good["logits"].double()}, "logits of torch.float64"),
        ({"logits": nan}, "not finite"),
        ({"keys": good["keys"][:-2]}, "not a file of logits"),
    ):
        save_file({k: v.contiguous() for k, v in {**good, **change}.items()}, path, {"livt": json.dumps(head)})
        with pytest.raises(DataError, match=message):
            load_outputs(path)


def read(path: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["livt"]), load_file(path)


def test_ldam_alone_scales_its_logits() -> None:
    assert LOSSES["ldam"]().logit_scale == 30
    assert LOSSES["ldam"](scale=8).logit_scale == 8
    assert {LOSSES[name]().logit_scale for name in LOSSES if name != "ldam"} == {1}


def test_logits_that_are_not_finite_are_named_by_their_images(tmp_path: Path) -> None:
    shards = tiny_shards(tmp_path / "set", {"a": 2, "b": 2})
    made = outputs(4, counts=(3, 3))
    logits = torch.tensor([[0.0, 1], [float("inf"), 1], [0, 1], [0, float("nan")]])
    with pytest.raises(RunError, match=r"2 of 4 images: '"):
        gather([logits], shards, made.about, world=World())
    found = gather([logits[[0, 2, 0, 2]]], shards, made.about, world=World())
    assert isinstance(found, Outputs)
    np.testing.assert_array_equal(found.labels, shards.labels(np.arange(4)))
