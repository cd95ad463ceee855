"""Reads DeepSpeed's native checkpoints of ZeRO 1, 2 or 3 without DeepSpeed: flat partitions become tensors by name.

    DIR/latest                                          the name of the newest, as global_step3
    DIR/global_step3/mp_rank_00_model_states.pt         buffers; names and shapes of each group's parameters
    DIR/global_step3/*zero_pp_rank_R_mp_rank_00_optim_states.pt    rank R's part of the fp32 weights and both moments

ZeRO 1 and 2 concatenate the parameters of a group, pad, and cut the result into one part per rank. ZeRO 3 cuts every
parameter into one part per rank, the last padded, and concatenates a rank's parts. Moments are stored like the weights.
Source: deepspeed/utils/zero_to_fp32.py (0.19.8), which reads only the weights, with an unrestricted unpickler.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from livt_scale.checkpoint.foreign.pickles import Inert, read_pickle
from livt_scale.util.errors import CheckpointDamaged, CheckpointError
from livt_scale.util.outside import read_text

RANK = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(model|optim)_states\.pt")
MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class DeepSpeedCheckpoint:
    stage: int
    world_size: int
    step: int
    name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def is_deepspeed(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "latest").is_file() or any(map(_file_kind, folder.iterdir())))


def read_deepspeed(folder: Path) -> DeepSpeedCheckpoint:
    """The tensors of a DeepSpeed checkpoint: `model.*` in fp32 and `optim.*`, unsharded, on the CPU.

    folder: the one with `latest`, or one of its tags. Raises CheckpointError if it is not a readable one.
    """
    folder = _tag_folder(folder)
    files = {path.name: path for path in folder.iterdir() if _file_kind(path)}
    parts = [int(m[2] if (m := RANK.fullmatch(name)) else name.split("_")[2]) for name in files]
    if any(parts):
        raise CheckpointError(f"{folder} is of a model that is itself spread over ranks (mp_rank_01)")
    optim = [read_pickle(files[name]) for name in _by_rank(files, "optim")]
    if not optim:
        raise CheckpointError(f"{folder} holds no *_optim_states.pt: it is not of ZeRO 1, 2 or 3")
    models = [read_pickle(files[name]) for name in (_by_rank(files, "model") or sorted(files)[:1])]
    try:
        return _assemble(folder, models, [o["optimizer_state_dict"] for o in optim])
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointDamaged(f"{folder} is not laid out as DeepSpeed 0.19 does: {error!r}") from error


def _assemble(folder: Path, models: list[Any], optim: list[Any]) -> DeepSpeedCheckpoint:
    stage, world_size = _stage(optim[0]["zero_stage"]), optim[0]["partition_count"]
    world_size = max(world_size) if isinstance(world_size, list) else world_size
    if len(optim) != world_size:
        raise CheckpointDamaged(f"{folder} is of {world_size} ranks, and the files of {len(optim)} are there")
    found = DeepSpeedCheckpoint(stage, world_size, int(models[0]["global_steps"]), folder.name)
    for name in models[0]["buffer_names"]:
        if name in models[0]["module"]:  # a buffer that is not persistent is not
            found.tensors[f"model.{name}"] = models[0]["module"][name]
    shapes: list[dict[str, Any]] = models[0]["param_shapes"]
    for name, tensor in _weights_and_moments(stage, world_size, shapes, optim):
        found.tensors[name] = tensor.clone()  # not a view of all of them
    _frozen(found, models)
    for name, other in (models[0].get("shared_params") or {}).items():
        if f"model.{other}" in found.tensors:
            found.tensors[f"model.{name}"] = found.tensors[f"model.{other}"].clone()
    for what in ("lr_scheduler", "data_sampler", "random_ltd"):
        if models[0].get(what) is not None:
            found.left.append(what)
    known = {"cur_scale", "loss_scaler"} & optim[0].keys()
    found.left += ["optimizer's rates and decay (the recipe's count)", *(["loss scale"] if known else [])]
    return found


def _weights_and_moments(
    stage: int, world_size: int, shapes: list[dict[str, Any]], optim: list[Any]
) -> Iterator[tuple[str, Tensor]]:
    base = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    weights = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    states = [o[base]["state"] for o in optim]
    groups = range(len(optim[0][weights]))
    flat: dict[str, list[list[Tensor]]] = {"": [[o[weights][g] for g in groups] for o in optim]}
    flat |= {moment: [[state[g][moment] for g in groups] for state in states] for moment in MOMENTS}
    steps = [torch.as_tensor(float(states[0][g]["step"])) for g in groups]
    walk = _by_parameter if stage == 3 else _by_group
    for moment, parts in flat.items():
        for name, tensor, group in walk(parts, shapes, world_size, optim[0]):
            yield (f"optim.{name}.{moment}" if moment else f"model.{name}"), tensor
            if not moment:
                yield f"optim.{name}.step", steps[group]


def _by_group(
    parts: list[list[Tensor]], shapes: list[dict[str, Any]], world_size: int, first: dict[str, Any]
) -> Iterator[tuple[str, Tensor, int]]:
    """ZeRO 1 and 2. parts: by rank and group, flat."""
    paddings = first.get("param_alignment_paddings")
    for group, named in enumerate(shapes):
        whole = torch.cat([rank[group] for rank in parts])
        offset = 0
        for number, (name, shape) in enumerate(named.items()):
            yield name, whole[offset : offset + math.prod(shape)].view(tuple(shape)), group
            offset += math.prod(shape) + (paddings[group][number] if paddings else 0)
        if not offset <= whole.numel() <= offset + 2 * world_size * world_size:
            raise ValueError(f"group {group} has {whole.numel()} values for {offset}")


def _by_parameter(
    parts: list[list[Tensor]], shapes: list[dict[str, Any]], world_size: int, _first: dict[str, Any]
) -> Iterator[tuple[str, Tensor, int]]:
    """ZeRO 3. parts: by rank and (sub)group, flat; a parameter may lie across two of them."""
    ends = torch.tensor([group.numel() for group in parts[0]]).cumsum(0)
    ranks = [torch.cat(groups) for groups in parts]
    offset = 0
    for name, shape in ((n, s) for named in shapes for n, s in named.items()):
        each = math.ceil(math.prod(shape) / world_size)
        whole = torch.cat([flat[offset : offset + each] for flat in ranks])
        group = int((ends > offset).nonzero()[0])
        yield name, whole[: math.prod(shape)].view(tuple(shape)), group
        offset += each
    if offset != ranks[0].numel():
        raise ValueError(f"a rank has {ranks[0].numel()} values for {offset}")


def _frozen(found: DeepSpeedCheckpoint, models: list[Any]) -> None:
    """Parameters without an optimizer: complete in ZeRO 1 and 2, sharded in ZeRO 3."""
    for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
        parts = [m["frozen_param_fragments"][name].flatten() for m in (models if found.stage == 3 else models[:1])]
        found.tensors[f"model.{name}"] = torch.cat(parts)[: math.prod(shape)].view(tuple(shape)).clone()


def _tag_folder(folder: Path) -> Path:
    latest = folder / "latest"
    if not latest.is_file():
        return folder
    try:
        tag = read_text(latest, "note").strip()
    except (OSError, ValueError) as error:
        raise CheckpointDamaged(f"{latest} cannot be read: {error}") from error
    if not tag or "/" in tag or tag in (".", "..") or not (folder / tag).is_dir():
        raise CheckpointDamaged(f"{latest} names {tag[:80]!r}, which is no folder beside it")
    return folder / tag


def _file_kind(path: Path) -> bool:
    return bool(RANK.fullmatch(path.name) or MODEL.fullmatch(path.name))


def _by_rank(files: dict[str, Path], kind: str) -> list[str]:
    ranked = sorted((int(m[1]), name) for name in files if (m := RANK.fullmatch(name)) and m[3] == kind)
    if [rank for rank, _ in ranked] != list(range(len(ranked))):
        raise CheckpointDamaged(f"{kind} states are there of the ranks {[rank for rank, _ in ranked]} alone")
    return [name for _, name in ranked]


def _stage(value: Any) -> int:
    """An enum of DeepSpeed's, read as an inert object, or a number."""
    stage = value.args[0] if isinstance(value, Inert) else value
    if stage not in (1, 2, 3):
        raise ValueError(f"ZeRO stage {stage!r}")
    return int(stage)
