"""The two files of a project, as text: plain YAML in which each value has its reason beside it.

project/shards.yaml      what `livt shards build` reads
project/recipe.yaml      what `livt train` reads
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from livt_scale.longtail import Counts, imbalance_factor
from livt_scale.project.raw_images import RawImages
from livt_scale.project.values import Value
from livt_scale.util.text import escaped

RESIZE_SHORTER = 256  # px: what 224 px evaluation resizes to
SOURCE = "images"


def spec_values(
    images: RawImages, name: str, *, fraction: Value, shorter_px: int, class_names: list[str] | None = None
) -> dict[str, Value]:
    """The values of the shard spec by dotted name. fraction: used where there are no evaluation images."""
    values = {"name": Value(name, "of the folder with the sets")}
    if class_names is not None:
        values["class_names"] = Value(class_names, "those of training: the evaluation folder has only some of them")
    if images.evaluation is None:
        train = evaluation = SOURCE
        values |= _source(SOURCE, images.train, "where the images are")
        part = {"fraction": fraction.value, "seed": 0}
        values[f"sources.{SOURCE}.split"] = Value(part, fraction.why)
    else:
        train, evaluation = "training-images", "evaluation-images"
        values |= _source(train, images.train, "where the training images are")
        values |= _source(evaluation, images.evaluation, "where the evaluation images are")
    prepare, why = {}, ""
    if shorter_px > 1.5 * RESIZE_SHORTER:
        prepare = {"prepare": {"resize_shorter": RESIZE_SHORTER}}
        why = f"; the shorter side of the images is {shorter_px} px (median), and a model sees 224 px or less"
    values["sets.train"] = Value({"source": train, "role": "training"} | prepare, f"trained on{why}")
    values["sets.val"] = Value({"source": evaluation, "role": "evaluation"} | prepare, f"for the accuracy{why}")
    return values


def _source(name: str, options: dict[str, Any], why: str) -> dict[str, Value]:
    return {f"sources.{name}.{kind}": Value(part, why) for kind, part in options.items()}


def spec_text(values: Mapping[str, Value], *, images: RawImages, path: str) -> str:
    """`path`: of the file, as commands name it."""
    head = (
        f"# The shards of {escaped(images.location)}: a spec that `livt init` wrote.\n"
        f"# When the images have changed, build them again: livt shards build {path} --again\n"
    )
    return head + as_yaml(values)


def recipe_text(
    values: Mapping[str, Value], *, name: str, images: RawImages, counts: Counts, num_val: int, path: str
) -> str:
    """`counts` [C]: training images. `path`: of the file, as commands name it."""
    head = (
        f"# A recipe for {escaped(images.location)} that `livt init` wrote; change what you like.\n"
        f"# {int(counts.sum()):,} training images of {len(counts):,} classes, {int(counts.max()):,} to "
        f"{int(counts.min()):,} of a class: imbalance factor {imbalance_factor(counts):,.4g}. "
        f"{num_val:,} evaluation images.\n"
        f"# Train:                  livt train {path}\n"
        f"# Check after a change:   livt recipe check {path} --data\n"
        f"# Estimate time on GPUs:  livt plan {path} --gpus 1 --device h100\n"
    )
    first = {
        "extends": Value("livt:base/livt", "the paper's values for all that is not below"),
        "name": Value(name, f"the run is written to runs/{name} where training is started"),
    }
    return head + as_yaml({**first, **values})


def as_yaml(values: Mapping[str, Value]) -> str:
    """Block mappings for the dotted names, in their order; each value in one line, its reason as a comment."""
    lines: list[str] = []
    written: set[str] = set()
    for name, (value, why) in values.items():
        keys = name.split(".")
        for depth in range(len(keys) - 1):
            part = ".".join(keys[: depth + 1])
            if part not in written:
                written.add(part)
                lines.append(f"{'  ' * depth}{keys[depth]}:")
        lines.append(f"{'  ' * (len(keys) - 1)}{keys[-1]}: {_inline(value)}  # {why}")
    return "\n".join(lines) + "\n"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    if isinstance(value, str) and value.replace("_", "").replace("-", "").replace("/", "").isalnum():
        is_number = value[0] == "-" or value[0].isdigit()  # or may be one
        return json.dumps(value) if is_number or value.lower() in _YAML_WORDS else value
    return escaped(json.dumps(value, ensure_ascii=False))  # YAML's escapes in double quotes are Python's


_YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")
