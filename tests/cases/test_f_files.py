"""F: anything from outside is checked for kind and size, and bounded in time and memory."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import re
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from livt_scale.checkpoint.foreign.convert import read
from livt_scale.checkpoint.foreign.pickles import read_pickle
from livt_scale.checkpoint.manifest import CheckpointManifest, read_manifest
from livt_scale.cli.ckpt import ls
from livt_scale.cli.import_ import _show as show_import
from livt_scale.cli.progress import progress_of
from livt_scale.cli.shards import info
from livt_scale.config.load import load_recipe
from livt_scale.data.build.verify import verify as verify_set
from livt_scale.data.image.decode import BadImage, decode
from livt_scale.data.manifest import canonical_json
from livt_scale.data.shard_set import ShardSet
from livt_scale.evaluation.results import results_table
from livt_scale.train.export_info import is_export
from livt_scale.train.load_trained import read_trained
from livt_scale.train.resume_rules import compare_facts
from livt_scale.util.atomic import file_lock
from livt_scale.util.errors import (
    CheckpointDamaged,
    CheckpointMismatch,
    LivtError,
    ManifestError,
    RecipeError,
    UsageError,
    WeightsError,
)
from livt_scale.util.log import OneLine
from livt_scale.weights.importer import import_weights, open_weights
from livt_scale.weights.layouts import infer_model
from tests.tiny_run import tiny_classifier, tiny_recipe, tiny_run

BASE = "name: r\ndata: {train: t}\nstages:\n  pretrain:\n    epochs: 90\n"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    model = tiny_classifier(tiny_recipe(width=16, depth=1, heads=1), num_classes=4)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text.isprintable()
    assert len(text) < 5000
    return text


def archive(
    pickled: bytes, path: Path, *, method: int = zipfile.ZIP_STORED, pieces: dict[str, bytes] | None = None
) -> Path:
    """A zip archive as torch.save writes it, around a pickle of ours."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", pickled, compress_type=method)
        file.writestr("a/byteorder", "little")
        file.writestr("a/version", "3\n")
        for key, data in (pieces or {}).items():
            file.writestr(f"a/data/{key}", data)
    return path


# --- F1: a pipe, or a link to /dev/zero ---


@pytest.mark.parametrize("name", ["manifest.json", "index.npy", "keys.bin", "quarantine.json", "train-000000.tar"])
@pytest.mark.parametrize("kind", ["pipe", "zeros"])
def test_f1_what_is_not_a_file_in_a_set_of_shards_is_named_without_waiting(name, kind, tiny_shards, copy_of):
    folder = copy_of(tiny_shards / "train")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/dev/zero")
    with pytest.raises(LivtError, match="not a regular file") as error:
        ShardSet.open(folder)
    assert name in one_line(error.value)


@pytest.mark.parametrize("kind", ["pipe", "zeros"])
def test_f1_a_recipe_and_a_lock_that_are_no_files_are_refused(kind, tmp_path):
    for name in ("r.yaml", "lock"):
        os.mkfifo(tmp_path / name) if kind == "pipe" else (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(RecipeError, match="not a regular file"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(OSError, match=r"not a regular file|symbolic links"), file_lock(tmp_path / "lock"):
        pass


# --- F2, F3: files of torch.save that cost more than they are worth ---


def test_f2_a_tensor_that_is_larger_than_what_is_stored_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1).expand(1 << 20, 1 << 14)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="larger than what is stored") as error:
        open_weights(tmp_path / "x.pth")
    one_line(error.value)


DOUBLED = b")" + b"2\x86" * 70  # a tuple of a tuple of …, each twice
BOMBS = {
    "bytes": b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x05\x00\x85R.",
    "key": b"\x80\x02}" + DOUBLED + b"Ns.",
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "memo as text": b"\x80\x02Np99999999999\n.",
    "encoding": b"\x80\x02c_codecs\nencode\nX\x03\x00\x00\x00aaaX\x08\x00\x00\x00punycode\x86R.",
    "storage": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ\x00\x00\x00\x7ftQ.",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("old", [False, True])
def test_f3_a_pickle_that_would_take_memory_or_time_is_refused_at_once(name, old, tmp_path):
    path = tmp_path / "x.pth"
    if old:  # the format before torch 1.6: pickles one after the other
        path.write_bytes(
            pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + BOMBS[name]
        )
    else:
        archive(BOMBS[name], path, pieces={"0": bytes(4)})
    began = time.process_time()
    with pytest.raises(CheckpointDamaged, match="was refused") as error:
        read_pickle(path)
    assert time.process_time() - began < 2
    one_line(error.value)


def test_f3_a_deflated_pickle_is_refused(tmp_path):
    archive(b"\x80\x02" + b"N0" * 1_000_000 + b"N.", tmp_path / "x.pth", method=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointDamaged, match="compressed or encrypted"):
        read_pickle(tmp_path / "x.pth")


# --- F4: one thing under many names ---


def test_f4_entries_that_overlap_or_have_one_name_are_refused(tmp_path, weights):
    path = tmp_path / "x.pth"
    torch.save(weights, path)
    raw = bytearray(path.read_bytes())
    first, second = [m.start() for m in re.finditer(b"PK\x01\x02", raw)][-3:-1]
    raw[second + 42 : second + 46] = raw[first + 42 : first + 46]  # where its header is
    path.write_bytes(raw)
    with pytest.raises(CheckpointDamaged, match=r"overlaps another entry|changed since"):
        read_pickle(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w") as file:
            for _ in range(2):
                file.writestr("a/data.pkl", b"\x80\x02N.")
    with pytest.raises(CheckpointDamaged, match="the same name"):
        read_pickle(path)


def test_f4_tensors_that_show_one_piece_many_times_are_refused(tmp_path):
    tensor = torch.zeros(2**18)
    torch.save({f"w{k}": tensor.view(-1) for k in range(30)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointDamaged, match="more than 4 times over"):
        read_pickle(tmp_path / "x.pth")


def test_f4_a_file_that_a_manifest_lists_twice_is_refused():
    entry = {"name": "a", "bytes": 1, "sha256": "0" * 64, "rank": 0}
    with pytest.raises(ValueError, match="listed twice"):
        CheckpointManifest.model_validate(
            {"saved_at": "2026-01-02T03:04:05+00:00", "position": {"epoch": 0, "step": 0}, "world_size": 1,
             "score": None, "final": False, "num_tensors": 1, "torch": "2", "files": [entry, entry], "facts": {}}
        )  # fmt: skip


# --- F5 to F8 ---


@pytest.mark.parametrize("number", ["1000000000000", "9" * 6000, "x"])
def test_f5_blocks_are_those_that_are_there(number, weights):
    state = {**weights, f"blocks.{number}.norm1.weight": torch.ones(16)}
    assert infer_model(state, heads=1).dims.depth == 2


def test_f6_each_file_of_a_graph_of_recipes_is_read_once(tmp_path):
    for k in range(12):
        (tmp_path / f"r{k}.yaml").write_text(f"extends: [r{k + 1}.yaml, r{k + 1}.yaml]\nseed: {k}\n")
    (tmp_path / "r12.yaml").write_text(BASE)
    began = time.process_time()
    assert load_recipe(tmp_path / "r0.yaml").seed == 0
    assert time.process_time() - began < 3
    for k in range(40):
        (tmp_path / f"r{k}.yaml").write_text(f"extends: r{k + 1}.yaml\nseed: 1\n")
    with pytest.raises(RecipeError, match="more than 16 files in a row"):
        load_recipe(tmp_path / "r0.yaml")


@pytest.mark.parametrize(
    "text",
    ["x: " + "y " * 6_000_000, BASE + "seed: [" + "1, " * 300_000 + "1]\n", BASE + "seed: " + "[" * 200_000],
    ids=["bytes", "values", "depth"],
)
def test_f7_a_large_recipe_is_refused_before_it_is_parsed(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    began = time.process_time()
    with pytest.raises(RecipeError, match="more than") as error:
        load_recipe(tmp_path / "r.yaml")
    assert time.process_time() - began < 5
    one_line(error.value)


def test_f8_an_image_with_a_side_of_millions_of_pixels_is_refused():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1 << 26, 8, 0, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(2000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(BadImage, match="a side of more than 65,536"):
        decode(png)


# --- F9: one line for whatever is odd ---


@pytest.mark.parametrize(
    "info", [{}, {"model": None}, {"model": {"size": "\ud800"}}, {"model": 10**30}, [], {"model": {}}]
)
def test_f9_weights_json_and_config_json_without_a_model_are_one_line(info, tmp_path, weights):
    out = tmp_path / "out"
    torch.save(weights, tmp_path / "x.pth")
    import_weights(tmp_path / "x.pth", out, heads=1)
    digest = json.loads((out / "weights.json").read_text())["sha256"]
    given = {"format": "livt-weights", "sha256": digest, **info} if isinstance(info, dict) else info
    (out / "weights.json").write_text(json.dumps(given))
    if given and info != {"model": {}}:
        with pytest.raises(WeightsError, match=r"weights\.json") as error:
            open_weights(out)
        one_line(error.value)
    (out / "weights.json").unlink()
    (out / "config.json").write_text('{"livt": {}}')
    with pytest.raises(WeightsError, match=r"config\.json: model"):
        open_weights(out)
    assert not is_export(out)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, device="meta"),
        lambda: torch.ones(2, 3).to(torch.float8_e4m3fn),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.ones(2, dtype=torch.complex64),
        lambda: torch.zeros(2**40, 0),
        lambda: torch.ones(2, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
    ],
    ids=["meta", "float8", "sparse", "complex", "empty", "float4", "nested", "jagged"],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_f9_tensors_that_are_no_weights_are_one_line(make, tmp_path, weights):
    torch.save({**weights, "head.weight": make()}, tmp_path / "x.pth")
    with pytest.raises(LivtError) as error:
        import_weights(tmp_path / "x.pth", tmp_path / "out", heads=1)
    one_line(error.value)


DATES = ["not a date", "", "2026-13-45T00:00:00+00:00", "2026-01-02T03:04:05", "2026-W05", "9" * 6000]


@pytest.mark.parametrize("field", [{"saved_at": date} for date in DATES] + [{"world_size": 10**30}])
def test_f9_a_checkpoint_whose_manifest_has_an_impossible_value_is_listed_as_damaged(field, tmp_path, capsys):
    tiny_run(tmp_path, tiny_recipe(width=16, depth=1, heads=1), steps=(40, 80))
    path = tmp_path / "finetune" / "checkpoints" / "step-00000080" / "manifest.json"
    path.write_bytes(sealed({**json.loads(path.read_bytes()), **field}))
    with pytest.raises(CheckpointDamaged, match=r"manifest\.json") as error:
        read_manifest(path.parent)
    one_line(error.value)
    ls(tmp_path, as_json=True)
    listed = {row["step"]: row["whole"] for row in json.loads(capsys.readouterr().out)["checkpoints"]}
    assert listed == {40: True, 80: False}


def sealed(body: dict) -> bytes:
    """A checkpoint's manifest with the SHA-256 of itself."""
    digest = hashlib.sha256(spelled({**body, "sha256": ""})).hexdigest()
    return spelled({**body, "sha256": digest})


def spelled(body: dict) -> bytes:
    return (json.dumps(body, indent=1) + "\n").encode()


@pytest.mark.parametrize("field", [*({"saved_at": date} for date in DATES), {"score": "x"}, {"position": {"epoch": 1}}])
def test_f9_a_converted_checkpoint_with_an_impossible_value_is_one_line(field, tmp_path, weights):
    about = {"position": None, "score": None, "final": False, "saved_at": None, "facts": None, **field}
    save_file(weights, tmp_path / "x.safetensors", metadata={"format": "pt", "livt_checkpoint": json.dumps(about)})
    with pytest.raises(CheckpointDamaged, match="livt_checkpoint") as error:
        read(tmp_path / "x.safetensors")
    one_line(error.value)


@pytest.mark.parametrize("bytes_", [10**30, 2**63, 10**400], ids=["1e30", "2^63", "1e400"])
def test_f9_a_set_whose_manifest_gives_a_shard_impossible_bytes_is_one_line(bytes_, tiny_shards, copy_of):
    folder = copy_of(tiny_shards / "val")
    with changed_set(folder) as body:
        body["shards"][0]["bytes"] = bytes_
    with pytest.raises(ManifestError, match="more than 64 bits") as error:
        ShardSet.open(folder)
    one_line(error.value)
    assert [fault.shard for fault in verify_set(folder, workers=1)] == ["manifest.json"]


@contextmanager
def changed_set(folder: Path) -> Iterator[dict]:
    """The values of the manifest in `folder`, to be changed in the block; its digest is made right again."""
    body = json.loads((folder / "manifest.json").read_bytes())
    yield body
    del body["digest"]
    body["digest"] = hashlib.sha256(canonical_json(body)).hexdigest()
    (folder / "manifest.json").write_bytes(canonical_json(body))


@pytest.mark.parametrize(
    "sets", [[".".join("a" * 3000) + "=1"], ["a" * 10**6 + "=1"], ["seed=" + "[" * 1000], [f"seed={2**63}"]]
)
def test_f9_set_with_a_name_or_value_without_end_is_one_line(sets, tmp_path):
    (tmp_path / "r.yaml").write_text(BASE)
    with pytest.raises(UsageError) as error:
        load_recipe(tmp_path / "r.yaml", sets=sets)
    one_line(error.value)


# --- F10, F11: what is printed ---


def test_f10_names_reach_neither_error_nor_log_unescaped(tmp_path):
    evil = "a\n\x1b[2Jlivt: error: \u202e\ud800"
    assert str(LivtError(f"{evil} is missing", remedy=evil)).isprintable()
    record = logging.LogRecord("livt_scale", 30, "", 0, "%s is damaged", (evil,), None)
    assert OneLine().format(record).isprintable()
    assert str(LivtError(["first", evil])).count("\n") == 1  # of two mistakes, one line each


MARKUP = "[red]x[/][link=file:///etc]y[/link][/b]:bomb:\x1b[2J"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_f10_names_are_no_markup_in_tables_and_bars(tmp_path, monkeypatch, capsys):
    seen = MARKUP.replace("\x1b", "\\x1b")
    monkeypatch.setenv("COLUMNS", "200")
    figures = dict.fromkeys(("all", "many", "medium", "few"), 0.5)
    report = {"num_samples": MARKUP, "top1": figures, "top5": figures, "calibration": {"ece": 0.1}}
    results_table(tmp_path / MARKUP, report)
    told = {"used": [MARKUP], "left": [], "made": [], "changed": {MARKUP: MARKUP}}
    show_import({**told, "source": {"file": MARKUP, "layout": "mae"}, "out": MARKUP})
    printed = "".join(capsys.readouterr().out.split())  # a title is wrapped
    assert printed.count(seen) == 6
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with progress_of("shards") as progress:
        progress(MARKUP, 1, 2, 10)
    assert seen in terminal.getvalue()


def test_f10_class_names_are_printed_as_they_are(tiny_shards, copy_of, capsys):
    folder = copy_of(tiny_shards / "val")
    names = ["[red]x[/]", "[link=file:///]y[/link]", "[/b]", ":bomb:"]
    with changed_set(folder) as body:
        body["class_names"] = names
    info(str(folder))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-4:]] == names


def test_f11_a_foreign_file_is_not_quoted(tmp_path):
    (tmp_path / "secret.yaml").write_text("aws_secret: hunter2\n")
    (tmp_path / "passwd").write_text("hunter3: x\n")
    for base in ("secret.yaml", "passwd", "/etc/passwd"):
        (tmp_path / "r.yaml").write_text(f"extends: {base}\n{BASE}")
        with pytest.raises(RecipeError) as error:
            load_recipe(tmp_path / "r.yaml")
        assert not re.search("aws_secret|hunter[23]|:x:0", one_line(error.value))


def test_f11_advice_and_links_of_libraries_are_not_passed_on(tmp_path, weights):
    for value in (torch.nn.Module, torch.nn.Linear(1, 1)):
        torch.save({"model": value}, tmp_path / "x.pth")
        with pytest.raises(CheckpointDamaged) as error:
            read_pickle(tmp_path / "x.pth")
        assert "weights_only" not in one_line(error.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(weights, tmp_path / "y.pth")
        read_pickle(tmp_path / "y.pth", mmap=True)
    with pytest.raises(WeightsError) as error:
        infer_model(weights, heads=5)
    assert "pydantic" not in one_line(error.value)


@pytest.mark.parametrize("recipe", [{"model": {"size": "vit_micro", "heads": 3}}, {"a\n": 1}, [], None])
def test_f11_a_checkpoint_of_an_impossible_recipe_is_one_line(recipe, tmp_path):
    tiny_run(tmp_path, tiny_recipe(width=16, depth=1, heads=1), steps=(40,))
    path = tmp_path / "finetune" / "checkpoints" / "step-00000040" / "manifest.json"
    body = json.loads(path.read_bytes())
    body["facts"]["recipe"] = recipe
    path.write_bytes(sealed(body))
    for read_it in (
        lambda: read_trained(path.parent),
        lambda: compare_facts(body["facts"], body["facts"], path.parent),
    ):
        with pytest.raises(CheckpointMismatch) as error:
            read_it()
        assert "pydantic" not in one_line(error.value)


# --- D4 ---


@pytest.mark.parametrize("mmap", [False, True])
def test_d4_a_flipped_bit_in_a_file_of_torch_is_found_and_named(mmap, tmp_path, weights):
    path = tmp_path / "x.pth"
    torch.save(weights, path)
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        entry = max(file.infolist(), key=lambda entry: entry.file_size)
    raw[entry.header_offset + 30 + len(entry.filename) + 100] ^= 4
    path.write_bytes(raw)
    with pytest.raises(CheckpointDamaged, match=r"x\.pth.*data/\d+.*CRC-32"):
        read_pickle(path, mmap=mmap)
