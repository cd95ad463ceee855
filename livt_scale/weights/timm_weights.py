"""Starts a model of timm from weights: a file of timm's, or of a layout that timm itself converts; an encoder of ours.

    took = start_timm(classifier, read_state(path)[0], keep_head=False, where="vit.safetensors")

Names and shapes are converted by timm's own function for the family (`checkpoint_filter_fn`): it knows the layouts of
the original repositories, and resamples positions and patches to the model's image size. Another number of channels is
adapted as in `weights.adapt`. Then everything but the head must match; of ViTs, the last norm may differ (`norm` before
the class token's head, `fc_norm` after mean pooling), and an MAE's decoder is left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from livt_scale.config.timm_models import TimmSpec
from livt_scale.models.timm_backbone import TimmClassifier
from livt_scale.util.errors import WeightsError
from livt_scale.util.outside import sha256_of
from livt_scale.util.text import first_line
from livt_scale.weights.adapt import Taken, with_channels
from livt_scale.weights.importer import heads_beside
from livt_scale.weights.locate import find_file
from livt_scale.weights.read_files import checked_state, read_state

_LAST_NORM = re.compile(r"(fc_)?norm\.(weight|bias)")
_MAY_BE_LEFT = re.compile(r"decoder_.*|mask_token|head(_dist)?\..*")


def start_from_file(classifier: TimmClassifier, path: Path, *, keep_head: bool) -> dict[str, Any]:
    """Load the file or folder `path` into `classifier`, in place. Returns its lineage. Raises WeightsError."""
    file = find_file(path)
    state, _ = read_state(file, integers=True)  # before the digest: a file that is not weights may have terabytes
    digest = sha256_of(file)
    check_heads(classifier, heads_beside(file.parent, digest)[0], where=str(file))
    start_timm(classifier, state, keep_head=keep_head, where=str(file))
    return {"stage": "import", "checkpoint": file.name, "recipe_digest": digest, "layout": "timm"}


def start_from_hub(classifier: TimmClassifier, spec: TimmSpec, *, keep_head: bool) -> dict[str, Any]:
    """Load timm's own weights of the model, from the hub or from its cache on this machine. Raises WeightsError."""
    import timm
    from timm.models import load_state_dict_from_hf

    hub_id = timm.get_pretrained_cfg(spec.name).hf_hub_id
    if not hub_id:
        raise WeightsError(
            f"timm has no weights of {spec.name} to download",
            remedy=f"choose one of timm.list_pretrained('{spec.name}*')",
        )
    try:
        found = load_state_dict_from_hf(hub_id, weights_only=True)
    except Exception as error:  # of the hub's client, of the network, of the file
        raise WeightsError(
            f"{hub_id} cannot be downloaded: {first_line(error)}",
            remedy="fetch the file, and set stages.finetune.weights to it",
        ) from error
    start_timm(classifier, checked_state(found, where=hub_id, integers=True), keep_head=keep_head, where=hub_id)
    return {"stage": "import", "checkpoint": hub_id, "recipe_digest": hub_id, "layout": "timm"}


def check_heads(classifier: TimmClassifier, heads: int | None, *, where: str) -> None:
    """Raise WeightsError where weights are known to be of another number of attention heads: shapes do not show it."""
    own = next((m.num_heads for m in classifier.modules() if isinstance(getattr(m, "num_heads", None), int)), None)
    if heads is not None and own is not None and heads != own:
        raise WeightsError(f"{where} has {heads} heads, the model {own}", remedy="set model.args: {num_heads: …}")


@torch.no_grad()
def start_timm(classifier: TimmClassifier, state: Mapping[str, Tensor], *, keep_head: bool, where: str) -> Taken:
    """Put `state` into `classifier`, in place; with `keep_head` its head too. Raises WeightsError."""
    try:
        fitted = dict(_filter_of(classifier)(dict(state), classifier))
    except Exception as error:  # of a state that the family's function was not made for
        raise WeightsError(
            f"{where} is not of this model: timm's conversion fails: {type(error).__name__}: {first_line(error)}",
            remedy="give weights of the model in model.timm",
        ) from error
    own = classifier.state_dict()
    changed = _adapt_channels(classifier, fitted, own)
    head = f"{classifier.facts.head}."
    made = tuple(
        n for n in own if (n.startswith(head) and not keep_head) or (n not in fitted and _LAST_NORM.fullmatch(n))
    )
    used = tuple(name for name in own if name in fitted and name not in made)
    _check(own, fitted, made=made, head=head, where=where, keep_head=keep_head)
    for name in used:
        own[name].copy_(fitted[name])
    return Taken(used, tuple(name for name in fitted if name not in used), made, changed)


def _check(
    own: Mapping[str, Tensor],
    fitted: Mapping[str, Tensor],
    *,
    made: tuple[str, ...],
    head: str,
    where: str,
    keep_head: bool,
) -> None:
    needed = [name for name in own if name not in made and not name.endswith("num_batches_tracked")]
    wrong = [f"{name} is missing" for name in needed if name not in fitted]
    wrong += [
        f"{name} is {list(fitted[name].shape)}, the model's {list(own[name].shape)}"
        for name in needed
        if name in fitted and fitted[name].shape != own[name].shape
    ]
    match = len(needed) - len(wrong)
    wrong += [
        f"{name} has no place"
        for name in fitted
        if name not in own
        and not name.startswith(head)
        and not (_MAY_BE_LEFT.fullmatch(name) or _LAST_NORM.fullmatch(name))
    ]
    if wrong:
        of_head = keep_head and all(text.startswith(head) for text in wrong)
        raise WeightsError(
            f"{where} is of another model: {match} of {len(needed)} tensors match; the first that does not: {wrong[0]}",
            remedy="set keep_head: false" if of_head else "set model.timm and model.args to the model that they are of",
        )


def _adapt_channels(classifier: Any, fitted: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, str]:
    """Adapt the first convolution in `fitted`, in place, to another number of channels."""
    names = classifier.pretrained_cfg.get("first_conv") or ()
    changed = {}
    for name in (f"{each}.weight" for each in ((names,) if isinstance(names, str) else names)):
        if name not in fitted or name not in own or fitted[name].ndim != 4:
            continue
        old, new = fitted[name].shape[1], own[name].shape[1]
        if old != new:
            fitted[name] = with_channels(fitted[name], new)
            changed[name] = f"channels {old} -> {new}"
    return changed


def _filter_of(classifier: TimmClassifier) -> Callable[[dict[str, Tensor], Any], Mapping[str, Tensor]]:
    """The family's own conversion; of a family that needs none, the identity."""
    family = next(kind.__module__ for kind in type(classifier).__mro__ if kind.__module__.startswith("timm."))
    found: Any = getattr(sys.modules[family], "checkpoint_filter_fn", None)
    return found or (lambda state, _: state)
