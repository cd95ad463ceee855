"""Reads the tensors of a third-party file: safetensors, or written by `torch.save`. Executes nothing in it.

Training scripts wrap the weights: `{"model": …, "optimizer": …, "args": Namespace}` (MAE, LiVT), `{"module": …}`
(DeepSpeed), `{"state_dict": …}`. The wrapping is removed, and so are the `module.` of DistributedDataParallel and the
`_orig_mod.` of torch.compile. Other contents of the file (optimizer, arguments) are not looked at; a Namespace becomes
an inert object (`checkpoint.foreign.pickles`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from livt_scale.checkpoint.foreign.pickles import read_pickle
from livt_scale.checkpoint.tensor_file import read_safetensors
from livt_scale.util.errors import CheckpointDamaged, WeightsError

WRAPPED_IN = ("model", "state_dict", "module")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PREFIXES = ("module.", "_orig_mod.")


def read_state(path: Path, *, integers: bool = False) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(weights in `path`, float32 on the CPU, by the file's own names; its other contents). Raises WeightsError.

    Refused: a truncated file or one that calls code, values that are not floating-point numbers, NaN and infinity.
    integers: keep whole numbers as they are, which networks other than ours have as buffers (batch norm's count).
    """
    if path.suffix == ".safetensors":
        found, beside = _read_safetensors(path), tuple[str, ...]()
    else:
        found, beside = _read_pickled(path)
    return checked_state(found, where=str(path), integers=integers), beside


def checked_state(found: Mapping[str, Tensor], *, where: str, integers: bool = False) -> dict[str, Tensor]:
    """`found` in float32. Raises WeightsError for values that are not floating-point numbers, NaN and infinity."""
    state: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if integers and tensor.dtype in INTEGERS and not tensor.is_meta:
            state[name] = tensor
            continue
        if name.endswith("num_batches_tracked"):
            raise WeightsError(
                f"{where} is of a network with batch norm ({name}), a CNN: livt import reads ViTs",
                remedy="train it as a model of timm: set model.timm, and the file as stages.finetune.weights",
            )
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            kind = "a tensor without values" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
            raise WeightsError(f"{where}: {name} is {kind}: weights are dense real numbers")
        state[name] = tensor.to(torch.float32)
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise WeightsError(
            f"{where}: NaN or infinity in {len(broken)} tensors, the first is {broken[0]}",
            remedy="take another checkpoint: this one had diverged, or is damaged",
        )
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return {_plain(name): tensor for name, tensor in read_safetensors(path)[0].items()}
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}", remedy="fetch it again, or take another file") from error


def _read_pickled(path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    try:
        tree = read_pickle(path, mmap=True)
    except CheckpointDamaged as error:
        raise WeightsError(error.message, remedy=error.remedy) from error
    beside: tuple[str, ...] = ()
    for key in WRAPPED_IN:
        if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping):
            beside = tuple(str(name) for name in tree if name != key)
            tree = tree[key]
            break
    if not isinstance(tree, Mapping):
        raise WeightsError(f"{path} holds {type(tree).__name__}, not a dict of tensors")
    tensors = {_plain(name): value for name, value in tree.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(tree):
        others = [str(name) for name, value in tree.items() if not isinstance(value, Tensor)]
        raise WeightsError(
            f"{path} is not a dict of tensors: it holds {', '.join(others[:5]) or 'nothing'}",
            remedy=f"the weights should be there, or under {', '.join(WRAPPED_IN)}",
        )
    return tensors, beside


def _plain(name: Any) -> str:
    text = str(name)
    while prefix := next((p for p in PREFIXES if text.startswith(p)), None):
        text = text.removeprefix(prefix)
    return text
