"""Files of `torch.save` from elsewhere, read without running anything in them, in bounded memory and time.

First the archive (`archive`) and what the pickle would do (`dry_run`) are checked; what passes goes to torch's
restricted unpickler (`weights_only=True`), which makes tensors and plain values. The names that it may ask for are
listed here. Those of DeepSpeed's and of training scripts' own classes become inert objects; any other is refused, and
named, before anything is made. `getattr`, by which Python 3.11.0 to 3.11.3 pickles Enums, finds the members of the
Enum in that list alone.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import safe_globals

from livt_scale.checkpoint.foreign.archive import MAX_PICKLE_BYTES, read_archive
from livt_scale.checkpoint.foreign.dry_run import dry_run
from livt_scale.util.errors import CheckpointDamaged
from livt_scale.util.outside import open_checked
from livt_scale.util.text import first_line

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
ALLOWED = frozenset(
    (
        *HARMLESS,
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "builtins.getattr",
        "collections.OrderedDict",
        "_codecs.encode",
        "builtins.set",
        "builtins.complex",
        "torch.Size",
        "torch.Tensor",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.storage.TypedStorage",
        "torch.storage.UntypedStorage",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._tensor._rebuild_from_type_v2",
    )
)
_OF_TORCH = re.compile(r"torch\.(?:[A-Z]\w*Storage|(?:bfloat|float|int|uint|complex|bool|q)\w*)")
_OLD_TAR = b"ustar"  # at byte 257: the format before torch 0.1.10
_NUM_OLD_PICKLES = 5  # before torch 1.6: magic number, version, machine, the object, keys of the pieces behind them


ZERO_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}


class Inert:
    """Replaces an object of another library in a pickle: keeps the constructor's arguments and does nothing."""

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
    try:
        with open_checked(path, "weights") as file:
            is_archive = _check(file)
            file.seek(0)
            return _load(path if mmap and is_archive else file, mmap=mmap and is_archive)
    except OSError as error:
        raise CheckpointDamaged(f"{path} cannot be read ({error.strerror})") from error
    except Exception as error:  # damaged and hostile files raise whatever they like
        raise _refused(path, error) from error


def read_tensor(raw: bytes, *, check_crc: bool) -> Any:
    """What `torch.save` wrote into `raw`. Raises ValueError for what is refused, and whatever torch raises."""
    file = io.BytesIO(raw)
    _check(file, check_crc=check_crc)
    file.seek(0)
    return _load(file)


def is_allowed(name: str) -> bool:
    return name in ALLOWED or _OF_TORCH.fullmatch(name) is not None


def _load(file: Path | BinaryIO, *, mmap: bool = False) -> Any:
    with safe_globals(list(STAND_INS)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, to whoever wrote the file
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


def _check(file: BinaryIO, *, check_crc: bool = True) -> bool:
    """Raise ValueError for what would cost more than the file is worth. Whether it is an archive."""
    archive = read_archive(file, check_crc=check_crc)
    if archive is not None:
        dry_run(archive.pickle, pieces=archive.pieces, allowed=is_allowed)
        return True
    size = file.seek(0, 2)
    file.seek(0)
    data = file.read(MAX_PICKLE_BYTES)
    if data[257:262] == _OLD_TAR:
        raise ValueError("it is in the tar format of torch before 0.1.10")
    end, stored = 0, 0
    for _ in range(_NUM_OLD_PICKLES):
        found = dry_run(data, begin=end, allowed=is_allowed)
        end, stored = found.end, stored + sum(found.stored.values())
    if end + stored > size:
        raise ValueError(f"its tensors take {stored:,} bytes, and the file has {size:,}")
    return False


def _refused(path: Path, error: Exception) -> CheckpointDamaged:
    why = first_line(error)
    if "weights_only" in why or "torch.load" in why:  # advice to execute it after all
        why = "torch's restricted unpickler refuses it"
    return CheckpointDamaged(
        f"{path} was refused: {why}",
        remedy="Nothing in it was executed. Take a file of tensors and plain values",
    )
