"""A model's logits of each evaluation image, saved so that reports can be made without running the model again.

    report = evaluate(model, shards, recipe, world=world, keep=(kept := []))     # this rank's logits, batch by batch
    outputs = gather(kept, report, shards, ...)                                  # on rank 0: all, in the set's order
    save(outputs, Path("logits.safetensors")); outputs = load(Path("logits.safetensors"))

The file is a safetensors file: logits float32 [N, C], labels int64 [N], the samples' keys as JSON bytes, and in its
metadata what the numbers describe. No pickle. Rows are in the order of the set, whatever the world size; a file of
24,426 images and 8,142 classes has 795 MB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor

from livt_scale.checkpoint.tensor_file import read_safetensors
from livt_scale.config.recipe import Recipe
from livt_scale.data.classes import TrainingClasses
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.world import World
from livt_scale.metrics import Tally
from livt_scale.util.atomic import write_atomic
from livt_scale.util.errors import DataError, RunError
from livt_scale.util.outside import parse_json
from livt_scale.util.text import first_line

FORMAT = "livt-logits"
VERSION = 1
CHUNK = 4096  # rows that are counted together


@dataclass(frozen=True)
class About:
    """The description of the logits in a file: JSON values."""

    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]  # images of the training set
    many_over: int
    few_under: int
    loss: str  # that the model was trained with
    logit_scale: float  # what that loss multiplied the logits by
    facts: dict[str, Any]  # of eval.json what is not counted from the logits: precision, views, data, weights
    group_counts: tuple[int, ...] | None = None  # images that decide the groups; None: class_counts do

    @classmethod
    def of(cls, classes: TrainingClasses, recipe: Recipe, report: Mapping[str, Any]) -> Self:
        """Of the logits that `report` was counted from."""
        finetune, data = recipe.stages.finetune, recipe.data
        assert finetune is not None
        return cls(
            class_names=classes.names,
            class_counts=classes.counts,
            group_counts=classes.group_counts,
            many_over=data.many_over,
            few_under=data.few_under,
            loss=finetune.loss.name,
            logit_scale=finetune.loss.logit_scale,
            facts={name: report[name] for name in ("precision", "views", "data", "weights") if name in report},
        )


@dataclass(frozen=True)
class Outputs:
    """logits float32 [N, C] and labels int64 [N] on the CPU, keys [N]: sample i of the set in row i."""

    logits: Tensor
    labels: Tensor
    keys: tuple[str, ...]
    about: About

    def __post_init__(self) -> None:
        num, classes = len(self.keys), len(self.about.class_names)
        assert self.logits.shape == (num, classes), (tuple(self.logits.shape), num, classes)
        assert self.labels.shape == (num,), (tuple(self.labels.shape), num)

    @property
    def counts(self) -> np.ndarray:
        """int64 [C] training images of each class."""
        return np.asarray(self.about.class_counts, dtype=np.int64)

    def part(self, rows: np.ndarray) -> Outputs:
        """The samples `rows` alone."""
        chosen = torch.from_numpy(rows)
        return Outputs(self.logits[chosen], self.labels[chosen], tuple(self.keys[i] for i in rows), self.about)

    def with_logits(self, logits: Tensor) -> Outputs:
        return Outputs(logits, self.labels, self.keys, self.about)

    def report(self, *, shift: Tensor | None = None, scale: float = 1.0) -> dict[str, Any]:
        """The figures of `evaluate`, counted again from scale · (logits + shift), and what they are about.

        shift: float32 [C]. The sum is made a few rows at a time, never of all.
        """
        tally = Tally(len(self.about.class_names))
        for logits, labels in zip(self.logits.split(CHUNK), self.labels.split(CHUNK), strict=True):
            tally.update((logits if shift is None else logits + shift) * scale, labels)
        about = self.about
        figures = tally.report(
            self.counts, many_over=about.many_over, few_under=about.few_under, group_counts=about.group_counts
        )
        return {**figures, **self.about.facts}


def gather(kept: list[Tensor], shards: ShardSet, about: About, *, world: World) -> Outputs | None:
    """All ranks' logits on rank 0, None elsewhere; a collective call. `kept`: of this rank, float [B, C] each.

    Raises RunError on every rank if a logit is not finite: such an image cannot be evaluated.
    """
    num_classes = len(about.class_names)
    own = torch.cat([k.float().cpu() for k in kept]) if kept else torch.empty(0, num_classes)
    everywhere = to_rank_0(own, world)
    positions = shards.usable_to_sample(np.arange(shards.num_samples, dtype=np.int64))
    keys = tuple(shards.keys(positions)) if world.is_main else ()

    def whole() -> None:
        if everywhere is not None:
            _check_finite(everywhere, keys)

    world.peers.on_rank0(whole)
    if everywhere is None:
        return None
    return Outputs(everywhere, torch.from_numpy(shards.labels(positions)), keys, about)


def save_outputs(outputs: Outputs, path: Path) -> None:
    """Write `outputs` to `path` atomically; the same outputs give the same bytes."""
    head = {"format": FORMAT, "version": VERSION, **asdict(outputs.about)}
    keys = torch.frombuffer(bytearray(json.dumps(outputs.keys).encode()), dtype=torch.uint8)
    tensors = {"logits": outputs.logits.contiguous(), "labels": outputs.labels.contiguous(), "keys": keys}
    write_atomic(path, save(tensors, metadata={"livt": json.dumps(head, allow_nan=False)}))


def load_outputs(path: Path) -> Outputs:
    """Read what `save_outputs` wrote. Raises DataError that names what is wrong with the file."""
    remedy = "write it again with `livt eval RUN --save-logits FILE`"
    try:
        tensors, metadata = read_safetensors(path, "logits")
        head = parse_json(metadata["livt"].encode())
        if (head.pop("format"), head.pop("version")) != (FORMAT, VERSION):
            raise ValueError("it is of another format or version")
        head |= {name: tuple(head[name]) for name in ("class_names", "class_counts")}
        head["group_counts"] = tuple(head["group_counts"]) if head.get("group_counts") is not None else None
        about = About(**head)
        keys = tuple(parse_json(tensors["keys"].numpy().tobytes()))
        _check_fit(tensors, keys, about)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}", remedy=remedy) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a file of logits: {first_line(error)}", remedy=remedy) from error
    return Outputs(tensors["logits"], tensors["labels"], keys, about)


def to_rank_0(own: Tensor, world: World) -> Tensor | None:
    """[n_r, C] of each rank -> [sum of n_r, C] on rank 0, in the order of ranks, which is that of the set."""
    if world.world_size == 1:
        return own
    sizes = world.peers.all_gather(len(own))
    padded = torch.zeros(max(sizes), own.shape[1])  # gather requires equal shapes
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in sizes] if world.is_main else None
    dist.gather(padded, parts, dst=0)
    return None if parts is None else torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _check_finite(logits: Tensor, keys: tuple[str, ...]) -> None:
    bad = (~logits.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        named = ", ".join(repr(keys[i]) for i in bad[:3])
        raise RunError(
            f"the model gives logits that are not finite for {len(bad)} of {len(keys)} images: {named}",
            remedy="look at its training, or evaluate in fp32",
        )


def _check_fit(tensors: dict[str, Tensor], keys: tuple[str, ...], about: About) -> None:
    """Raise ValueError unless the parts of a file belong together and can be used as they are."""
    logits, labels = tensors["logits"], tensors["labels"]
    num_classes = len(about.class_names)
    if not all(isinstance(text, str) for text in (*keys, *about.class_names, about.loss)):
        raise ValueError("keys, class_names and loss must be text")
    groups = about.class_counts if about.group_counts is None else about.group_counts
    if not all(isinstance(n, int) and n >= 0 for n in (*about.class_counts, *groups, about.many_over, about.few_under)):
        raise ValueError("class_counts and thresholds must be numbers of images")
    if not isinstance(about.logit_scale, int | float) or not 0 < about.logit_scale < float("inf"):
        raise ValueError(f"logit_scale is {about.logit_scale!r}")
    if len(about.class_counts) != num_classes or len(groups) != num_classes or not isinstance(about.facts, dict):
        raise ValueError(f"{len(about.class_counts)} class_counts for {num_classes} class_names")
    if logits.shape != (len(keys), num_classes) or labels.shape != (len(keys),) or not num_classes or not keys:
        shapes = f"logits {list(logits.shape)}, labels {list(labels.shape)}"
        raise ValueError(f"{shapes} for {len(keys)} keys and {num_classes} classes")
    if logits.dtype != torch.float32 or labels.dtype != torch.int64:
        raise ValueError(f"logits of {logits.dtype}, labels of {labels.dtype}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())} for {num_classes} classes")
    if not logits.isfinite().all():
        raise ValueError("a logit is not finite")
