"""Weights from a stranger: files of torch.save, their zip archive and pickle changed, and safetensors files."""

from __future__ import annotations

import functools
import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import save

from tests.fuzz.examples import few, many
from tests.fuzz.limited import Outcome, example, livt
from tests.fuzz.mutations import (
    EVIL,
    as_json,
    byte_changes,
    change_bytes,
    change_file,
    change_tree,
    chosen,
    file_changes,
    fractions,
    odd_values,
    tree_changes,
    write_json,
)
from tests.fuzz.pickles import SNIPPETS, changed_pickle
from tests.tiny_run import tiny_classifier, tiny_recipe

TENSORS: dict[str, Any] = {
    "expanded": lambda: torch.zeros(1).expand(1 << 20, 1 << 14),
    "meta": lambda: torch.empty(3, device="meta"),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
    "nothing": lambda: torch.zeros(0, 5),
    "wide": lambda: torch.zeros(2**40, 0),
    "half": lambda: torch.ones(2, 3, dtype=torch.float16),
    "float8": lambda: torch.ones(2, 3).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(2, dtype=torch.complex64),
    "scalar": lambda: torch.tensor(1.0),
    "nan": lambda: torch.full((2,), torch.nan),
    "number": lambda: 5,
    "text": lambda: "x",
    "deep": lambda: functools.reduce(lambda inner, _: {"model": inner}, range(200), {}),
}
NAMES = [
    f"blocks.{10**12}.norm1.weight", "blocks.x.norm1.weight", "blocks." + "9" * 6000 + ".norm1.weight", EVIL, "",
    "\ud800", "pos_embed",
    "cls_token", "head.weight", "mask_token", "decoder_blocks.0.norm1.weight", "vit.embeddings.cls_token",
    "module.module.head.bias",
    "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "model", "a" * 100_000,
]  # fmt: skip
new_tensors = st.lists(st.tuples(chosen(NAMES), chosen([*TENSORS])), max_size=2)
wrapping = chosen([(), (), ("model",), ("state_dict",), ("module", "model")])
pickled = st.fixed_dictionaries(
    {
        "format": st.just("pth"),
        "tensors": st.one_of(st.just([]), new_tensors),
        "wrapped": wrapping,
        "old": chosen([False, False, True]),
        "snippets": st.lists(st.tuples(fractions, chosen(SNIPPETS)), max_size=2),
        "pickle": st.one_of(st.just([]), st.just([]), byte_changes),
        "entries": st.lists(
            st.tuples(chosen(["deflate", "twice", "drop", "rename", "bomb", "shorten"]), fractions), max_size=2
        ),
        "bytes": st.one_of(st.just([]), st.just([]), byte_changes),
    }
)
safetensors = st.fixed_dictionaries(
    {
        "format": st.just("safetensors"),
        "tensors": st.one_of(st.just([]), new_tensors),
        "header": st.one_of(st.just([]), tree_changes),
        "metadata": st.one_of(st.none(), odd_values),
        "length": st.one_of(st.none(), chosen([0, 1, 2**31, 2**63, 10**8])),
        "bytes": st.one_of(st.just([]), st.just([]), byte_changes),
    }
)
cases = st.tuples(
    st.one_of(pickled, safetensors),
    st.one_of(st.none(), st.none(), file_changes),
    st.one_of(st.none(), odd_values, tree_changes),  # weights.json, or changes of a right one
    chosen(["import", "import", "convert"]),
)


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    return dict(tiny_classifier(tiny_recipe(width=16, depth=1, heads=1), num_classes=4).state_dict())


def changed_weights(case: dict) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kinds of tensors that torch will not have for ever
        return {**weights(), **{name: TENSORS[kind]() for name, kind in case["tensors"]}}


def torch_file(case: dict) -> bytes:
    state = changed_weights(case)
    for name in case["wrapped"]:
        state = {name: state, "epoch": 3}
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=not case["old"])
    raw = file.getvalue()
    if case["old"]:
        return change_bytes(changed_pickle(raw, case), case["bytes"])
    return change_bytes(changed_archive(raw, case), case["bytes"])


def changed_archive(raw: bytes, case: dict) -> bytes:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entries = [[entry.filename, archive.read(entry), zipfile.ZIP_STORED] for entry in archive.infolist()]
    for entry in entries:
        if entry[0].endswith("data.pkl"):
            entry[1] = changed_pickle(entry[1], case)
    for kind, where in case["entries"]:
        at = int(where * len(entries))
        if kind == "deflate":
            entries[at][2] = zipfile.ZIP_DEFLATED
        elif kind == "bomb":
            entries[at][1:] = [bytes(2**26), zipfile.ZIP_DEFLATED]
        elif kind == "twice":
            entries.insert(at, list(entries[at]))
        elif kind == "rename":
            entries[at][0] = "archive/../" + EVIL
        elif kind == "shorten":
            entries[at][1] = entries[at][1][: len(entries[at][1]) // 2]
        elif len(entries) > 1:
            del entries[at]
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
        warnings.simplefilter("ignore")  # two entries of one name
        for name, data, method in entries:
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=method)
    return file.getvalue()


def safetensors_file(case: dict) -> bytes:
    state = {name: tensor for name, tensor in changed_weights(case).items() if isinstance(tensor, torch.Tensor)}
    plain = {
        name.encode("utf-8", "replace").decode(): tensor.contiguous()
        for name, tensor in state.items()
        if tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested or tensor.is_quantized)
        and tensor.untyped_storage().nbytes() >= tensor.numel()
    }  # fmt: skip
    raw = save(plain, metadata={"format": "pt"})
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    if case["metadata"] is not None:
        header["__metadata__"] = {"format": "pt", "livt_checkpoint": as_json(case["metadata"])}
    text = as_json(change_tree(header, case["header"])).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    claimed = len(text) if case["length"] is None else case["length"]
    return change_bytes(claimed.to_bytes(8, "little") + text + raw[8 + length :], case["bytes"])


def run_case(base: Path, case: tuple) -> Outcome:
    made, file, info, command = case
    with example(base) as folder:
        (folder / "in").mkdir()
        path = folder / "in" / f"model.{made['format']}"
        path.write_bytes(torch_file(made) if made["format"] == "pth" else safetensors_file(made))
        if info is not None:
            write_json(folder / "in" / "weights.json", info)
        if file:
            change_file(folder / "in", file)
        words = ("import", path.relative_to(folder), "--out", "out", "--heads", "1")
        if command == "convert":
            words = ("ckpt", "convert", path.relative_to(folder), "--to", "out.safetensors")
        return livt(*words, cwd=folder)


def check(base: Path, case: tuple) -> None:
    run_case(base, case)


UNCHANGED = {
    "format": "pth", "tensors": [], "wrapped": (), "old": False, "snippets": [], "pickle": [], "entries": [],
    "bytes": [],
}  # fmt: skip
SEEDS = [(UNCHANGED, ("huge", 0.0), None, "import")]  # 64 GiB were hashed before they were looked at

SAFETENSORS: dict[str, Any] = {
    "format": "safetensors",
    "tensors": [],
    "header": [],
    "metadata": None,
    "length": None,
    "bytes": [],
}


@pytest.mark.parametrize("made", [UNCHANGED, SAFETENSORS], ids=lambda made: made["format"])
def test_weights_without_changes_are_imported(base: Path, made: dict) -> None:
    assert run_case(base, (made, None, None, "import")).code == 0


test_weights = few(cases, check, seeds=SEEDS)
test_many_weights = many(cases, check)
