"""Opens third-party weights under our names; `livt import` writes them as a folder that a run can start from.

    DIR/model.safetensors      our names (those of facebookresearch/mae), float32
    DIR/weights.json           their model, their origin, and their SHA-256

A run may start from that folder, from an export, or directly from the file: one code path, one check. The number of
heads cannot be inferred from the weights; it is in weights.json, in an export's config.json, and in Hugging Face's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from livt_scale.checkpoint.tensor_file import write_tensors
from livt_scale.config.recipe import Model
from livt_scale.models.classifier import build_classifier
from livt_scale.models.mae import MaskedAutoencoder
from livt_scale.util.atomic import new_folder, plain_disk_errors
from livt_scale.util.errors import UsageError, WeightsError, nearest
from livt_scale.util.outside import first_mistake, read_json, real_path, sha256_of
from livt_scale.weights.adapt import Taken, adapt, compare
from livt_scale.weights.layouts import LAYOUTS, Layout, detect, infer_model, to_ours
from livt_scale.weights.locate import SAFETENSORS, find_file
from livt_scale.weights.read_files import read_state

INFO = "weights.json"


@dataclass(frozen=True)
class Weights:
    """Weights by our names, float32 on the CPU, and what is known of them. `heads` None: not in the file."""

    state: dict[str, Tensor]
    layout: Layout
    file: Path
    sha256: str
    beside: tuple[str, ...]  # other contents of the file, not looked at
    heads: int | None
    decoder_heads: int | None

    def check_heads(self, model: Model) -> None:
        """Raise WeightsError where they are known to be of another number of heads than `model`."""
        pairs = [("heads", self.heads, model.dims.heads)]
        if "mask_token" in self.state:
            pairs.append(("decoder.heads", self.decoder_heads, model.decoder.heads))
        for name, theirs, ours in pairs:
            if theirs not in (None, ours):
                raise WeightsError(f"{self.file} has {theirs} {name}, the model {ours}", remedy=f"set model.{name}")

    def origin(self) -> dict[str, Any]:
        """The lineage of a run that starts from these: the bytes of the file decide, not its place."""
        return {"stage": "import", "checkpoint": self.file.name, "recipe_digest": self.sha256, "layout": self.layout}


def open_weights(path: Path, *, layout: str = "auto") -> Weights:
    """The weights in the file or folder `path`. Raises WeightsError, UsageError (an unknown `layout`)."""
    if layout not in ("auto", *LAYOUTS):
        raise UsageError(f"no layout is called {layout!r} ({nearest(layout, ('auto', *LAYOUTS))})")
    file = find_file(path)
    state, beside = read_state(file)  # before the digest: a file that is not weights may have terabytes
    digest = sha256_of(file)
    found = detect(state)
    told: Layout = found if layout == "auto" else layout  # type: ignore[assignment]
    if (found == "hf") != (told == "hf"):
        raise WeightsError(f"{file} is not in the layout {told!r}: its names are those of {found!r}")
    heads, decoder_heads = heads_beside(file.parent, digest)
    return Weights(to_ours(state, told), told, file, digest, beside, heads, decoder_heads)


def import_weights(
    path: Path,
    out: Path,
    *,
    layout: str = "auto",
    heads: int | None = None,
    decoder_heads: int | None = None,
    image_px: int | None = None,
    patch_px: int | None = None,
    channels: int | None = None,
    drop_head: bool = False,
) -> dict[str, Any]:
    """Write the weights in `path` to the folder `out`, and report what was used, left, made and changed.

    A setting that is None stays as in the file. Raises UsageError (`out` is there), WeightsError.
    """
    if out.exists() or out.is_symlink():
        raise UsageError(f"{out} is there already", remedy="give a new folder as --out")
    weights = open_weights(path, layout=layout)
    given = infer_model(
        weights.state, heads=heads or weights.heads, decoder_heads=decoder_heads or weights.decoder_heads
    )
    model = _changed(given, image_px=image_px, patch_px=patch_px, channels=channels)
    state, changed = adapt(weights.state, model)
    head = tuple(n for n in state if n.startswith(("head.", "fc_norm."))) if drop_head else ()
    state = {name: tensor.contiguous() for name, tensor in state.items() if name not in head}
    taken = check(state, model)
    info = {
        "format": "livt-weights",
        "version": 1,
        "model": model.model_dump(mode="json"),
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else None,
        "has_decoder": "mask_token" in state,
        "source": {"file": weights.file.name, "layout": weights.layout, "sha256": weights.sha256},
    }
    num_bytes = sum(tensor.nbytes for tensor in state.values())
    with plain_disk_errors(real_path(out), needed=num_bytes), new_folder(real_path(out)) as temporary:
        write_tensors(state, temporary / SAFETENSORS, metadata={"format": "pt"})
        info["sha256"] = sha256_of(temporary / SAFETENSORS)
        (temporary / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="ascii")
    gone = tuple(name for name in weights.state if name not in state)
    report = Taken(tuple(state), (*gone, *weights.beside), taken.made, changed)
    return {"out": str(out), **info, **report.as_json()}


def check(state: Mapping[str, Tensor], model: Model) -> Taken:
    """What the network that `state` is of (a masked autoencoder, else a classifier) takes from it; nothing is built.

    Raises WeightsError where a part is missing or has another shape.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        if "mask_token" in state:
            network: torch.nn.Module = MaskedAutoencoder(model, norm_pix=True, num_kept=1)
        else:
            head = state.get("head.weight")
            if head is not None and not (head.ndim == 2 and len(head)):
                raise WeightsError(f"head.weight has the shape {list(head.shape)}, not [classes, width]")
            network = build_classifier(model, num_classes=1 if head is None else head.shape[0], drop_path=0.0)
    return compare({name: tensor.shape for name, tensor in network.state_dict().items()}, state)


def _changed(model: Model, **given: int | None) -> Model:
    """`model` with what is given; a new patch size keeps the image's, and the grid follows."""
    updates = {name: value for name, value in given.items() if value is not None}
    try:
        return Model.model_validate(model.model_dump() | updates)
    except ValidationError as error:
        raise UsageError(f"the model that this would be: {first_mistake(error)}") from error


def heads_beside(folder: Path, digest: str) -> tuple[int | None, int | None]:
    """(heads, the decoder's) from the JSON next to the weights; ours also has their digest, which must match."""
    info = _json(folder / INFO)
    if info.get("format") == "livt-weights":
        if info.get("sha256") != digest:
            raise WeightsError(f"{folder / SAFETENSORS} is not what {INFO} says", remedy="import it again")
        model = _model(folder / INFO, info.get("model"))
        return model.dims.heads, model.decoder.heads if info.get("has_decoder") else None
    config = _json(folder / "config.json")
    if isinstance(config.get("livt"), dict):
        return _model(folder / "config.json", config["livt"].get("model")).dims.heads, None
    return _whole(config.get("num_attention_heads")), _whole(config.get("decoder_num_attention_heads"))


def _model(path: Path, given: Any) -> Model:
    try:
        return Model.model_validate(given)
    except ValidationError as error:
        raise WeightsError(
            f"{path}: model: {first_mistake(error)}", remedy="was it written by another livt_scale?"
        ) from error


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = read_json(path, "description of weights")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read: {error}", remedy="remove it, or copy it again") from error
    return tree if isinstance(tree, dict) else {}
