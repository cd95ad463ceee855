"""Files that are published: readable as the umask says, and the same bytes each time. Cases D2, D3 and D5."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from livt_scale.checkpoint import tensor_file
from livt_scale.checkpoint.foreign.convert import Converted, Position, read, write_checkpoint, write_safetensors
from livt_scale.checkpoint.tensor_file import write_tensors, write_torch
from livt_scale.cli.main import app
from livt_scale.data.build.verify import verify
from livt_scale.data.manifest import QUARANTINE
from livt_scale.util.atomic import new_file, new_folder
from livt_scale.util.errors import DataError
from livt_scale.weights.importer import import_weights
from tests.small_sets import small_set
from tests.weights.small_mae import official_state

# --- D2: the umask's mode ---


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077], ids=oct)
def umask(request) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> set[int]:
    """The modes of the files below `folder`, less the bits that the umask takes off."""
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


def test_d2_whatever_a_library_writes_is_published_with_the_umasks_mode(tmp_path, umask):
    with new_folder(tmp_path / "out") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "plain").write_bytes(b"")
        save_file({"w": torch.zeros(2)}, temporary / "inner" / "private.safetensors")
    with new_file(tmp_path / "out" / "one.safetensors") as file:
        save_file({"w": torch.zeros(2)}, file.name)
    assert modes(tmp_path) == {0o666 & ~umask}


def test_d2_a_file_that_was_made_read_only_stays_so(tmp_path):
    with new_folder(tmp_path / "out") as temporary:
        (temporary / "frozen").write_bytes(b"")
        (temporary / "frozen").chmod(0o444)
    assert modes(tmp_path) == {0o444}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "given.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in official_state().items()}, path)
    return path


def test_d2_imported_weights_and_converted_checkpoints_have_the_umasks_mode(tmp_path, weights, umask):
    import_weights(weights, tmp_path / "out", heads=4, decoder_heads=2)
    write_safetensors(checkpoint(), tmp_path / "x.safetensors")
    write_checkpoint(checkpoint(), tmp_path / "step-00000008")
    assert modes(tmp_path) == {0o666 & ~umask}


# --- D3: the same bytes ---


def checkpoint() -> Converted:
    tensors = {f"model.{name}": torch.full((3, 2), float(k)) for k, name in enumerate("cab")}
    return Converted(
        "x", tensors, Position(1, 8), {"stage": "pretrain"}, 0.5, final=True, saved_at="2026-01-02T03:04:05+00:00"
    )


METADATA = {name: f'"{name}"\n\x01é' for name in ("format", "z", "a", "livt_checkpoint", "é")}


def test_d3_metadata_is_in_order_and_survives(tmp_path):
    """Within a process the library's order differs from call to call, so a few calls show what many processes do."""
    written = set()
    for k in range(8):
        path = tmp_path / f"{k}.safetensors"
        shuffled = dict(sorted(METADATA.items(), reverse=k % 2 == 0))
        write_tensors({"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.int8)}, path, metadata=shuffled)
        written.add(path.read_bytes())
    assert len(written) == 1
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == METADATA
    assert load_file(path)["b"].equal(torch.ones(2))


def test_d3_a_checkpoint_is_converted_to_the_same_bytes_each_time(tmp_path):
    for k in range(4):
        write_safetensors(checkpoint(), tmp_path / f"{k}.safetensors")
        write_checkpoint(checkpoint(), tmp_path / f"{k}")
    assert len({path.read_bytes() for path in tmp_path.glob("*.safetensors")}) == 1
    folders = [{p.name: p.read_bytes() for p in (tmp_path / f"{k}").iterdir()} for k in range(4)]
    assert all(folder == folders[0] for folder in folders)
    assert read(tmp_path / "0.safetensors").facts == checkpoint().facts


def test_d3_weights_are_imported_and_exported_to_the_same_bytes(tmp_path, weights):
    for k in range(2):
        import_weights(weights, tmp_path / f"{k}", heads=4, decoder_heads=2)
        write_torch({"model": checkpoint().tensors}, tmp_path / f"{k}" / "checkpoint.pth")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / f"{k}").iterdir()} for k in range(2))
    assert first == second


# --- D5: a quarantine that cannot be read ---


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return small_set(tmp_path_factory.mktemp("shards"))


LISTED = '"samples": [{"number": 0, "key": "none", "shard": "x", "class": 0, "reason": "r"}]'
QUARANTINES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(b'{"format": "livt-quarantine", '),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "of other shards": lambda path: path.write_text(f'{{"format": "livt-quarantine", "version": 1, {LISTED}}}'),
}


@pytest.mark.parametrize("make", QUARANTINES.values(), ids=QUARANTINES.keys())
def test_d5_a_quarantine_that_cannot_be_read_is_a_fault(shards, make):
    path = shards / QUARANTINE
    make(path)
    try:
        (fault,) = verify(shards, workers=1)
        assert (fault.shard, fault.key) == (QUARANTINE, None)
        assert fault.what
        assert str(path) not in fault.what
        result = CliRunner().invoke(app, ["shards", "verify", str(shards), "--workers", "1"])
        assert result.exit_code == 1
        assert QUARANTINE in result.output
    finally:
        path.rmdir() if path.is_dir() else path.unlink()
    assert verify(shards, workers=1) == []


def test_d5_a_damaged_quarantine_is_written_again_as_the_error_advises(shards):
    (shards / QUARANTINE).write_bytes(b"")
    assert verify(shards, workers=1, decode=True, quarantine=True) == []
    assert not (shards / QUARANTINE).exists()


# --- E8, where weights are imported ---


def test_e8_a_full_disk_in_import_is_one_line(tmp_path, weights, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(DataError, match="not enough space") as error:
        import_weights(weights, tmp_path / "out", heads=4, decoder_heads=2)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
