"""Converts checkpoints to one safetensors file and back, and from other formats. Executes nothing that they contain.

    read(path)                     a checkpoint of ours, a .safetensors file, a checkpoint of DeepSpeed (ZeRO 1, 2, 3),
                                   a folder of torch.distributed.checkpoint, a file of torch.save or a folder with one
    write_safetensors(it, file)    all tensors by name; position, score and facts as JSON in its metadata
    write_checkpoint(it, folder)   a checkpoint of ours: `livt train` resumes from it, if it has facts and moments

No tensor changes by a bit in either direction. The names of the tensors used, left out and created are kept for the
report. Every tensor is held in memory once, unsharded.
"""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from livt_scale.checkpoint import io
from livt_scale.checkpoint.dcp import FolderWriter, Pieces, plan_write, read_into
from livt_scale.checkpoint.dcp_metadata import METADATA, read_foreign_index
from livt_scale.checkpoint.foreign.deepspeed_files import is_deepspeed, read_deepspeed
from livt_scale.checkpoint.foreign.pickles import read_pickle
from livt_scale.checkpoint.load import read_tensors
from livt_scale.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    Moment,
    Position,
    SavedPosition,
    plain_score,
    read_manifest,
    step_name,
    step_of,
)
from livt_scale.checkpoint.tensor_file import read_safetensors, write_tensors
from livt_scale.distributed.collectives import Peers
from livt_scale.distributed.state_dict import AVERAGE, MOMENTS, plain_name
from livt_scale.util.atomic import new_file, new_folder, plain_disk_errors, sync_folder
from livt_scale.util.errors import CheckpointDamaged, CheckpointError, UsageError
from livt_scale.util.outside import first_mistake, parse_json

KEY = "livt_checkpoint"  # in a safetensors file's metadata
TORCH_FILES = ("pytorch_model.bin", "checkpoint.pth", "checkpoint.pt", "model.pth", "model.pt")
MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module")
OPTIMIZER_KEYS = ("optimizer", "optim", "optimizer_state_dict")
# torch.distributed.checkpoint.state_dict: optim.state.<name>.exp_avg; other tools put a prefix before it
_OPTIM_NAME = re.compile(r"(?:.+\.)?(?:optim|optimizer)\.(?:state\.)?(.+)\.(exp_avg|exp_avg_sq|step)")
_MODEL_NAME = re.compile(r"(?:(?:app|state)\.)?(?:model|module|state_dict)\.(.+)")


@dataclass(frozen=True)
class Converted:
    """Tensors by our names, on the CPU, and what else is known. facts: None if the source does not record any."""

    kind: str
    tensors: dict[str, Tensor]
    position: Position | None = None
    facts: dict[str, Any] | None = None
    score: float | None = None
    final: bool = False
    saved_at: str | None = None
    left: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    @property
    def used(self) -> str:
        model = sum(name.startswith("model.") for name in self.tensors)
        moments = sum(name.startswith("optim.") for name in self.tensors)
        num_bytes = sum(tensor.nbytes for tensor in self.tensors.values())
        averaged = sum(name.startswith(AVERAGE) for name in self.tensors) - 1  # without the count
        average = f"{averaged} of its average, " if averaged > 0 else ""
        return f"{model} tensors of the model, {moments} of its AdamW, {average}{io.readable(num_bytes)}"


class _FileMetadata(BaseModel):
    """The metadata KEY of a safetensors file that `write_safetensors` wrote."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    position: SavedPosition | None
    score: float | None
    final: bool
    saved_at: Moment | None
    facts: dict[str, Any] | None


def read(path: Path) -> Converted:
    """The checkpoint at `path`, whatever wrote it. CheckpointError where it cannot be read, UsageError for no such."""
    if not path.exists():
        raise UsageError(f"there is no {path}")
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return _ours(path)
        if is_deepspeed(path):
            return _of_deepspeed(path)
        if (path / METADATA).is_file():
            return _of_dcp(path)
        found = [path / name for name in TORCH_FILES if (path / name).is_file()]
        if not found:
            raise UsageError(
                f"{path} is no checkpoint that is known here",
                remedy=f"it would hold {MANIFEST}, latest, {METADATA}, or one of {', '.join(TORCH_FILES)}",
            )
        path = found[0]
    if not path.is_file():
        raise UsageError(f"{path} is not a file")  # a pipe would wait for ever
    return _of_safetensors(path) if path.suffix == ".safetensors" else _of_torch(path)


def write_safetensors(it: Converted, file: Path) -> None:
    """Write `it` atomically as one file, which must not exist yet."""
    _must_be_new(file)
    about = {
        "position": None if it.position is None else {"epoch": it.position.epoch, "step": it.position.step},
        "score": it.score,
        "final": it.final,
        "saved_at": it.saved_at,
        "facts": it.facts,
    }
    _enough_room(it, file.parent)
    with plain_disk_errors(file, needed=_num_bytes(it)), new_file(file) as opened:
        metadata = {"format": "pt", KEY: json.dumps(about, allow_nan=False)}
        write_tensors(it.tensors, Path(opened.name), metadata=metadata)


def write_checkpoint(it: Converted, folder: Path) -> None:
    """Write `it` atomically as a checkpoint of one rank. The folder must not exist yet.

    A folder named step-N must be of step N.
    """
    _must_be_new(folder)
    position = it.position or Position(0, 0)
    named = step_of(folder.name)
    if named is not None and named != position.step:
        raise UsageError(
            f"{folder.name} cannot hold step {position.step}", remedy=f"call it {step_name(position.step)}"
        )
    if not it.tensors:
        raise CheckpointError("there is no tensor to write")
    _enough_room(it, folder.parent)
    peers = Peers(all_raise=CheckpointError)
    plan = plan_write(it.tensors, peers)
    assert plan.metadata is not None
    with plain_disk_errors(folder, needed=_num_bytes(it)), new_folder(folder) as temporary:
        writer = FolderWriter(temporary, peers)
        results = writer.write_pieces(plan, Pieces.live(it.tensors, plan, peers))
        writer.write_metadata(plan.metadata, [results])
        manifest = CheckpointManifest.model_validate(
            {
                "saved_at": it.saved_at or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "position": {"epoch": position.epoch, "step": position.step},
                "world_size": 1,
                "score": plain_score(it.score),
                "final": it.final,
                "num_tensors": len(it.tensors),
                "torch": torch.__version__,
                "files": writer.entries(),
                "facts": it.facts or {},
            }
        )
        io.write_synced(temporary / MANIFEST, manifest.to_bytes())
        sync_folder(temporary)


def trained_by(it: Converted, facts: dict[str, Any], position: Position) -> Converted:
    """`it` as a checkpoint of the run that `facts` describe, at `position`."""
    return replace(
        it, facts=facts, position=position, made=[*it.made, f"the facts of the recipe, step {position.step}"]
    )


def _ours(path: Path) -> Converted:
    tensors = read_tensors(path)  # every byte is checked
    m = read_manifest(path)
    kind = f"a checkpoint of livt, {path.name}, by {m.world_size} ranks"
    return Converted(kind, tensors, m.position, m.facts, m.score, m.final, m.saved_at)


def _of_safetensors(path: Path) -> Converted:
    try:
        tensors, metadata = read_safetensors(path)
        about = parse_json(metadata.get(KEY, "null").encode())
    except (ValueError, OSError) as error:
        raise CheckpointDamaged(f"{path} cannot be read as safetensors: {error}") from error
    if about is None:
        return _named("a safetensors file from elsewhere", tensors, [])
    try:
        it = _FileMetadata.model_validate(about)
    except ValidationError as error:
        problem = first_mistake(error)
        raise CheckpointDamaged(f"{path}: the metadata {KEY} is not what livt writes: {problem}") from error
    position = None if it.position is None else it.position.position
    kind = "a checkpoint of livt in a safetensors file"
    return Converted(kind, tensors, position, it.facts, it.score, it.final, it.saved_at)


def _of_deepspeed(path: Path) -> Converted:
    found = read_deepspeed(path)
    kind = f"a checkpoint of DeepSpeed, {found.name}: ZeRO {found.stage}, {found.world_size} ranks"
    named = _named(kind, found.tensors, found.left)
    return replace(named, position=Position(0, found.step), made=["epoch 0: DeepSpeed knows steps alone"])


def _of_dcp(path: Path) -> Converted:
    index, others = read_foreign_index(path)
    tensors = {name: torch.empty(saved.shape, dtype=saved.dtype) for name, saved in index.tensors.items()}
    if tensors:
        read_into(path, tensors, index, check_crc=True)
    return _named("a folder of torch.distributed.checkpoint", tensors, [f"{name} (not a tensor)" for name in others])


def _of_torch(path: Path) -> Converted:
    tree = read_pickle(path)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}, not tensors by name")
    weights, under = _weights_in(tree)
    if not weights:
        raise CheckpointError(
            f"{path} holds no tensors by name", remedy=f"they would be at its top or under {', '.join(MODEL_KEYS)}"
        )
    left = [] if under is None else [str(key) for key in tree if key != under and key not in OPTIMIZER_KEYS]
    plain = {plain_name(str(name).removeprefix("module.")): tensor for name, tensor in weights.items()}
    tensors = {f"model.{name}": tensor for name, tensor in plain.items()}
    for key in OPTIMIZER_KEYS if under is not None else ():
        if key in tree:
            moments, why = _moments_in(tree[key], plain)
            tensors |= moments
            left += [f"{key} ({why})"] if why else []
    return _named("a file of torch.save", tensors, left)


def _weights_in(tree: dict[Any, Any]) -> tuple[dict[Any, Tensor], str | None]:
    """The tensors by name, and under which key they lie (None: at the top)."""
    for key in MODEL_KEYS:
        inner = tree.get(key)
        if isinstance(inner, dict) and inner and all(isinstance(v, Tensor) for v in inner.values()):
            return inner, key
    return {k: v for k, v in tree.items() if isinstance(v, Tensor)}, None


def _moments_in(optimizer: Any, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Adam's moments by name, or why they cannot be matched: torch numbers parameters and does not name them."""
    try:
        state, groups = optimizer["state"], optimizer["param_groups"]
        numbers = [number for group in groups for number in group["params"]]
        named = [name for group in groups for name in group.get("param_names", ())]
        if not named and len(groups) == 1 and len(numbers) == len(weights):
            named = list(weights)
        if len(named) != len(numbers):
            return {}, "it numbers its parameters, and does not name them"
        found: dict[str, Tensor] = {}
        for number, name in zip(numbers, named, strict=True):
            plain = plain_name(str(name).removeprefix("module."))
            values = {moment: torch.as_tensor(state[number][moment]) for moment in MOMENTS}
            if values["exp_avg"].shape != weights[plain].shape or values["exp_avg_sq"].shape != weights[plain].shape:
                return {}, f"the moments of {plain} have another shape"
            found |= {f"optim.{plain}.{moment}": value for moment, value in values.items()}
    except (KeyError, TypeError, AttributeError):
        return {}, "not the state of an Adam"
    return found, ""


def _named(kind: str, tensors: dict[str, Tensor], left: list[str]) -> Converted:
    """Tensors by our names; if none has such a name yet, all are treated as the model's."""
    ours = {}
    has_prefix = any(_MODEL_NAME.fullmatch(name) for name in tensors)
    for name, tensor in tensors.items():
        if match := _OPTIM_NAME.fullmatch(name):
            target = f"optim.{plain_name(match[1])}.{match[2]}"
        elif match := _MODEL_NAME.fullmatch(name):
            target = f"model.{plain_name(match[1])}"
        elif not has_prefix:
            target = f"model.{plain_name(name)}"
        else:
            left = [*left, name]
            continue
        if target in ours:
            raise CheckpointError(f"two tensors would be called {target}")
        if target.endswith(".step") and target.startswith("optim."):
            tensor = tensor.to(torch.float32).reshape(())  # as torch's AdamW counts; others use whole numbers
        ours[target] = tensor.contiguous()
    made = []
    if not any(name.startswith("optim.") for name in ours):
        made.append("it has weights but no moments: training cannot resume from it")
    return Converted(kind, ours, left=left, made=made)


def _must_be_new(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise UsageError(f"{target} is there already", remedy="remove it, or give another --to")
    if not target.parent.is_dir():
        raise UsageError(f"there is no folder {target.parent}", remedy="make it, or give another --to")


def _num_bytes(it: Converted) -> int:
    return sum(tensor.nbytes for tensor in it.tensors.values())


def _enough_room(it: Converted, folder: Path) -> None:
    needed, free = _num_bytes(it), io.free_bytes(folder)
    if free < needed:
        raise CheckpointError(f"{folder} has {io.readable(free)} free, and {io.readable(needed)} are needed")
