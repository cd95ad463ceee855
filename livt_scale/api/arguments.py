"""Arguments of the public API, checked as the fields of the same names that a recipe has.

    part = checked(Finetune, {"global_batch": 65, "mixup": 0.8, …})
    UsageError: global_batch is 65: mixup and cutmix pair neighbours, so make it even

One set of rules and defaults for recipes and arguments; the error names the argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, NonNegativeInt, PositiveInt, ValidationError

from livt_scale.config.data import Data
from livt_scale.config.recipe import Finetune
from livt_scale.config.runtime import RecipePart
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.choices import UNKNOWN_NAME, UNKNOWN_OPTION
from livt_scale.util.errors import UsageError

P = TypeVar("P", bound=BaseModel)
NO_END = 10**9  # epochs


class ImageShape(RecipePart):
    """What is no field of one part of a recipe alone."""

    image_px: PositiveInt
    channels: Literal[1, 3]
    seed: NonNegativeInt = 0
    batch: PositiveInt = 1
    num_branches: NonNegativeInt = 0


def checked(part: type[P], values: Mapping[str, Any]) -> P:
    """`values` as `part`. Raises UsageError that names the first argument that is wrong."""
    try:
        return part.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":  # a rule over several fields, whose message starts with one of them
        raise UsageError(str(first["ctx"]["error"]))
    where = [str(step) for step in first["loc"]]
    if first["type"] in (UNKNOWN_NAME, UNKNOWN_OPTION):
        raise UsageError(f"{'.'.join(where)} is {first['input']!r}", remedy=str(first["ctx"]["hint"]))
    remedy = str(first["msg"]).replace("Input should be", "give")
    raise UsageError(f"{where[0]} is {values.get(where[0])!r}", remedy=remedy)


def open_shards(shards: ShardSet | str | Path) -> ShardSet:
    """`shards`, opened if it is their folder or URL. Raises UsageError for anything else, and as `ShardSet.open`."""
    if isinstance(shards, str | Path):
        return ShardSet.open(shards)
    if not isinstance(shards, ShardSet):
        raise UsageError(
            f"shards is of the type {type(shards).__name__}", remedy="give a livt.ShardSet, or its folder or URL"
        )
    return shards


def pixel_data(shards: ShardSet, *, channels: int, mean: Sequence[float], std: Sequence[float], **options: Any) -> Data:
    """The recipe's part `data` for reading `shards`. Raises UsageError."""
    remote = shards.remote.data.model_dump(exclude_unset=True, include={"cache", "remote"}) if shards.remote else {}
    data = checked(Data, {"train": shards.where, "mean": mean, "std": std, **remote, **options})
    for name in ("mean", "std"):
        if len(getattr(data, name)) != channels:
            raise UsageError(
                f"{name} has {len(getattr(data, name))} values, and channels is {channels}",
                remedy="give one value per channel",
            )
    return data


def training_part(
    *, global_batch: int, micro_batch: int | None, sampling: str | Mapping[str, Any], epochs: int | None, **others: Any
) -> Finetune:
    """The recipe's part with these values; the rest of it has no effect on samples. Raises UsageError."""
    return checked(
        Finetune,
        {
            "global_batch": global_batch,
            "micro_batch": global_batch if micro_batch is None else micro_batch,
            "sampling": {"policy": sampling} if isinstance(sampling, str) else sampling,
            "epochs": 1 if epochs is None else epochs,
            "warmup_epochs": 0,
            "init": "scratch",
            **others,
        },
    )


def device_of(device: torch.device | str) -> torch.device:
    """Raises UsageError where torch knows no such device."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device is {device!r}", remedy='give "cpu", "cuda" or "cuda:1"') from error


def check_position(epoch: int, step: int, *, epochs: int, steps_per_epoch: int) -> None:
    """Raise UsageError where a training of `epochs` has no such position; after an epoch's last step is one."""
    if not 0 <= epoch < epochs:
        last = f"to {epochs - 1}" if epochs < NO_END else "up"
        raise UsageError(f"epoch is {epoch}", remedy=f"epochs are numbered from 0 {last}")
    if not 0 <= step <= steps_per_epoch:
        raise UsageError(f"step is {step}", remedy=f"an epoch has {steps_per_epoch} steps, numbered from 0")
