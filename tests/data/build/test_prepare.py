"""Images made smaller at build time: never larger, upright, the same bytes whoever builds, recorded in the manifest."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from livt_scale.cli.main import app
from livt_scale.data.build.builder import build
from livt_scale.data.build.spec import load_spec
from livt_scale.data.build.writer import Prepare, prepared
from livt_scale.data.image.decode import decode
from livt_scale.data.manifest import ShardManifest
from livt_scale.data.reader import read_sample
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import DataError, SourceError
from tests.data.tiny_sets import HOSTILE, encoded, photo

SMALL = Prepare(resize_shorter=32, quality=90)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    folder = tmp_path / HOSTILE
    sizes = [(64, 90), (90, 64), (32, 50), (20, 90), (33, 33), (64, 64)]
    for k, (height, width) in enumerate(sizes):
        file = folder / "raw" / f"class{k % 2}" / f"{k}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(photo(height, width, seed=k)))
    (folder / "spec.yaml").write_text(
        json.dumps(
            {
                "name": "photos",
                "sources": {"raw": {"folder": {"root": "raw"}}},
                "sets": {"train": {"source": "raw", "shard_samples": 2}},
            }
        )
    )
    return folder / "spec.yaml"


def test_large_images_shrink_and_small_ones_stay_byte_for_byte(spec):
    build(load_spec(spec, prepare=SMALL), spec.parent / "out", workers=1)
    shards = ShardSet.open(spec.parent / "out" / "train")
    for k in range(shards.num_samples):
        data, _, key = read_sample(shards, k)
        raw = (spec.parent / "raw" / f"{key}.jpg").read_bytes()
        before, after = decode(raw).shape[:2], decode(data).shape[:2]
        if min(before) <= 32:
            assert data == raw
        else:
            assert after == tuple(round(side * 32 / min(before)) for side in before)
            assert min(after) == 32


def test_a_prepared_image_is_pillow_s_to_within_the_loss_of_a_jpeg():
    data = encoded(photo(120, 160), quality=98)
    _, small = prepared("jpg", data, Prepare(resize_shorter=60, quality=98))
    theirs = Image.open(io.BytesIO(data)).convert("RGB").resize((80, 60), Image.Resampling.BICUBIC)
    assert np.abs(decode(small).astype(int) - np.asarray(theirs)).mean() < 2


def test_a_turned_image_is_stored_upright_and_grey_stays_grey():
    exif = Image.Exif()
    exif[0x0112] = 6
    _, small = prepared("jpg", encoded(photo(90, 60), exif=exif), SMALL)
    assert Image.open(io.BytesIO(small)).size == (48, 32)
    _, grey = prepared("png", encoded(photo(90, 60)[:, :, 0], "PNG"), SMALL)
    assert Image.open(io.BytesIO(grey)).mode == "L"


def test_the_bytes_do_not_depend_on_who_builds_and_the_manifest_tells(spec):
    for name, workers in (("one", 1), ("two", 2)):
        build(load_spec(spec, prepare=SMALL), spec.parent / name, workers=workers)
    files = [
        {p.name: p.read_bytes() for p in (spec.parent / name / "train").iterdir() if p.is_file()}
        for name in ("one", "two")
    ]
    assert files[0] == files[1]
    told = ShardManifest.read(spec.parent / "one" / "train").source["spec"]["set"]["prepare"]
    assert told == {"resize_shorter": 32, "quality": 90}


def test_a_set_built_otherwise_is_not_taken_for_it(spec):
    build(load_spec(spec), spec.parent / "out", workers=1)
    with pytest.raises(DataError, match="built from another spec"):
        build(load_spec(spec, prepare=SMALL), spec.parent / "out", workers=1)


def test_a_spec_that_prepares_nothing_is_the_spec_it_was(spec):
    assert "prepare" not in load_spec(spec).neutral("train")["set"]


def test_a_damaged_image_is_named(spec):
    file = spec.parent / "raw" / "class1" / "1.jpg"
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(SourceError, match=r"source raw: 1 of 6 images .*does not decode.*: class1/1\.jpg"):
        build(load_spec(spec, prepare=SMALL), spec.parent / "out", workers=1)


def test_as_typed(spec):
    out = spec.parent / "typed"
    typed = ["shards", "build", str(spec), "--out", str(out), "--workers", "1"]
    assert CliRunner().invoke(app, [*typed, "--resize-shorter", "32", "--quality", "90"]).exit_code == 0
    assert ShardManifest.read(out / "train").source["spec"]["set"]["prepare"] == {"resize_shorter": 32, "quality": 90}
    wrong = CliRunner().invoke(app, [*typed, "--quality", "90"])
    assert wrong.exit_code != 0
    assert "--resize-shorter" in str(wrong.exception) + wrong.output + repr(getattr(wrong.exception, "remedy", ""))
