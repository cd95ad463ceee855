"""Files of `torch.save` from elsewhere, read without running anything in them.

torch's restricted unpickler (`weights_only=True`) makes tensors and plain values. A name beyond those is looked up in
the list below, of what DeepSpeed and training scripts leave beside their tensors, and becomes an inert object; any
other name is refused, and named, before anything is read. `getattr`, by which Python 3.11.0 to 3.11.3 pickles Enums,
finds the members of the Enum in that list alone.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from livt_scale.util.errors import CheckpointDamaged

HARMLESS = (
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


ZERO_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}


class Inert:
    """Stands where the pickle wanted an object of another library: keeps what it was made of, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class InertZeroStage(Inert):
    """Stands for DeepSpeed's ZeroStageEnum; `args` has its number."""


def enum_member(kind: Any, name: Any) -> Inert:
    """What stands for `getattr`: the member `name` of a known Enum."""
    if kind is InertZeroStage and type(name) is str and name in ZERO_STAGES:
        return InertZeroStage(ZERO_STAGES[name])
    raise pickle.UnpicklingError("it asks for builtins.getattr of something else than a known Enum")


STAND_INS: tuple[tuple[Any, str], ...] = (
    *((Inert, name) for name in HARMLESS),
    (InertZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (enum_member, "builtins.getattr"),
)


def read_pickle(path: Path, *, mmap: bool = False) -> Any:
    """What `torch.save` wrote into `path`, tensors on the CPU. CheckpointDamaged names what it was refused for.

    mmap: tensors are read when they are looked at; of no effect on the format before torch 1.6, which cannot be mapped.
    """
    with safe_globals(list(STAND_INS)):
        try:
            if others := sorted(_other_names(path)):
                raise _refused(path, f"it asks for {', '.join(others)}")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
        except CheckpointDamaged:
            raise
        except OSError as error:
            raise CheckpointDamaged(f"{path} cannot be read ({error.strerror})") from error
        except Exception as error:  # damaged and hostile files raise whatever they like
            name = re.search(r"GLOBAL (\S+)", str(error))
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise _refused(path, f"it asks for {name[1]}" if name else lines[0]) from error


def _other_names(path: Path) -> list[str]:
    """The names in a zip archive of torch's, found without running it; nothing of the format before (torch < 1.6)."""
    try:
        return get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError, pickle.UnpicklingError):
        return []  # torch.load says what is wrong with it


def _refused(path: Path, why: str) -> CheckpointDamaged:
    return CheckpointDamaged(
        f"{path} was refused: {why}",
        remedy="Nothing in it was executed. Take a file of tensors and plain values",
    )
