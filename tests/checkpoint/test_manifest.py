from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from livt_scale.checkpoint.manifest import (
    CheckpointManifest,
    FileEntry,
    Position,
    differences,
    plain_score,
    read_manifest,
    step_name,
    step_of,
)
from livt_scale.util.errors import CheckpointDamaged


def small_manifest() -> CheckpointManifest:
    return CheckpointManifest.model_validate(
        {
            "saved_at": "2026-01-02T03:04:05+00:00",
            "position": {"epoch": 2, "step": 20},
            "world_size": 1,
            "score": 0.25,
            "final": False,
            "num_tensors": 3,
            "torch": "2.14.1",
            "files": [{"name": "__0_0.distcp", "bytes": 5, "sha256": "a" * 64, "rank": 0}],
            "facts": {"note": "ü 1e-3", "lr": 0.001},
        }
    )


def test_a_manifest_comes_back_as_it_was():
    manifest = small_manifest()
    assert CheckpointManifest.from_bytes(manifest.to_bytes()) == manifest
    assert manifest.position == Position(2, 20)


def test_any_flipped_bit_of_the_manifest_is_found():
    raw = bytearray(small_manifest().to_bytes())
    for place in range(len(raw)):
        for bit in (0, 3, 5, 7):
            raw[place] ^= 1 << bit
            with pytest.raises(ValueError, match=r"."):
                CheckpointManifest.from_bytes(bytes(raw))
            raw[place] ^= 1 << bit


@pytest.mark.parametrize("other", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_what_is_no_manifest_is_damage_not_a_crash(tmp_path, other):
    (tmp_path / "manifest.json").write_bytes(other)
    with pytest.raises(CheckpointDamaged, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_a_later_format_version_is_named(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "livt-checkpoint", "version": 2}))
    with pytest.raises(CheckpointDamaged, match="format version 2"):
        read_manifest(tmp_path)


def test_a_checkpoint_renamed_to_another_step_is_found(save):
    path = save(7)
    with pytest.raises(CheckpointDamaged, match="is of step 7"):
        read_manifest(path.rename(path.with_name("step-00000008")))


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "manifest.json"])
def test_a_file_outside_the_folder_cannot_be_listed(name):
    with pytest.raises(ValidationError, match="not the name of a file"):
        FileEntry(name=name, bytes=1, sha256="0" * 64, rank=0)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00001234", 1234),
        ("step-123456789", 123456789),
        ("step-1234", None),
        ("step-000001234", None),
        (".step-00001234.partial", None),
        ("step-00001234 ", None),
        ("step-०००००००१", None),
    ],
)
def test_only_our_own_spelling_is_a_checkpoint_name(name, step):
    assert step_of(name) == step
    if step is not None:
        assert step_name(step) == name


def test_differences_name_each_field():
    old = {"recipe": {"model": {"width": 96, "depth": 4}, "seed": 0}, "counts": (1, 2), "gone": {}}
    new = {"recipe": {"model": {"width": 192, "depth": 4}, "seed": 0}, "counts": [1, 2], "new": None}
    assert differences(old, new) == [
        "gone: {} in the checkpoint, absent here",
        "new: absent in the checkpoint, null here",
        "recipe.model.width: 96 in the checkpoint, 192 here",
    ]
    assert differences(old, old) == []


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf"), None])
def test_a_score_that_cannot_be_compared_is_no_score(score):
    assert plain_score(score) is None
