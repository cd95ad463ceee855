"""The fields of a recipe by their dotted paths, and which of them a wrong name was meant to be.

fields_at(("stages", "pretrain"))     ["epochs", "global_batch", …]; none for a plain value
fields_called("lr")                   ["stages.pretrain.base_lr", "stages.finetune.base_lr"]
hint(("stages", "pretrain", "epoch")) "did you mean 'epochs'?"
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from livt_scale.config.optimizers import OPTIMIZERS, OptimizerOptions
from livt_scale.config.recipe import Recipe
from livt_scale.config.sampling import SAMPLERS, Sampler
from livt_scale.config.yaml import Where
from livt_scale.losses import LOSSES, LossOptions
from livt_scale.util.choices import Options
from livt_scale.util.errors import nearest
from livt_scale.util.names import listed

# parts whose fields follow from their name
_OPEN_PARTS: dict[type[BaseModel] | None, Mapping[str, type[Options]]] = {
    LossOptions: LOSSES,
    Sampler: SAMPLERS,
    OptimizerOptions: OPTIMIZERS,
}
# what other training scripts call a field of ours
USUAL_NAMES = {
    "arch": "size",
    "batch_size": "global_batch",
    "blr": "base_lr",
    "clip_grad_norm": "clip_grad",
    "img_size": "image_px",
    "input_size": "image_px",
    "learning_rate": "base_lr",
    "lr": "base_lr",
    "num_epochs": "epochs",
    "num_workers": "workers",
    "out": "run_dir",
    "output_dir": "run_dir",
    "wd": "weight_decay",
}


def hint(where: Where) -> str:
    """The hint for the unknown field `where`: a field of that name elsewhere, else the nearest name in its part."""
    name = str(where[-1])
    beside = fields_at(where[:-1])
    usual = USUAL_NAMES.get(name)
    if usual in beside:
        return f"did you mean {usual!r}?"
    if elsewhere := fields_called(name):
        return f"did you mean {listed(elsewhere)}?"
    return nearest(name, beside)


def fields_called(name: str) -> list[str]:
    """The dotted fields that `name` means: by their last parts, or by the name that other scripts have for them."""
    keys = tuple(name.split("."))
    for wanted in (keys, (*keys[:-1], USUAL_NAMES.get(keys[-1], keys[-1]))):
        found = [dotted(path) for path in all_fields() if path[-len(wanted) :] == wanted]
        if found:
            return found
    return []


def dotted(where: Where) -> str:
    return ".".join(map(str, where)) or "recipe"


def fields_at(where: Where) -> list[str]:
    """The fields that a part of the recipe has: `stages.pretrain` -> epochs, …; none for a plain value."""
    part = _part_at(where)
    models = _OPEN_PARTS[part].values() if part in _OPEN_PARTS else [part] if part else []
    return list(dict.fromkeys(field for model in models for field in model.model_fields))


def types_at(where: Sequence[str]) -> tuple[Any, ...]:
    """What a field may be, as Python types: (str, NoneType) for `data.val`; nothing for a field that is not there.

    Likewise a value of a mapping whose names the recipe gives: (str,) for `slurm.environment.NCCL_DEBUG`.
    """
    part = _part_at(where[:-1])
    if part is not None:
        return _options(part.model_fields[where[-1]].annotation) if where[-1] in part.model_fields else ()
    around = _part_at(where[:-2])
    if around is None or where[-2] not in around.model_fields:
        return ()
    mappings = [t for t in _options(around.model_fields[where[-2]].annotation) if typing.get_origin(t) is dict]
    return tuple(o for mapping in mappings for o in _options(typing.get_args(mapping)[1]))


def _part_at(where: Sequence[str | int]) -> type[BaseModel] | None:
    part: type[BaseModel] | None = Recipe
    for key in where:
        if part is None or key not in part.model_fields:
            return None
        options = _options(part.model_fields[str(key)].annotation)
        part = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return part


def _options(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(o for a in typing.get_args(annotation) for o in _options(a))
    if typing.get_origin(annotation) is typing.Annotated:
        return _options(typing.get_args(annotation)[0])
    return (annotation,)


def all_fields(where: Where = ()) -> list[Where]:
    here = [(*where, name) for name in fields_at(where)]
    return [path for field in here for path in (field, *all_fields(field))]
