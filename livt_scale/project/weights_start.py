"""The weights that a project starts from: which model they are of, and what their images were like.

A run of ours knows its recipe; a file or an import names its model, and its shape gives the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from livt_scale.config.load import load_saved
from livt_scale.config.model import Model
from livt_scale.config.run_place import SAVED
from livt_scale.project.values import Start
from livt_scale.train.run_dir import is_run
from livt_scale.weights.importer import open_weights
from livt_scale.weights.layouts import infer_model

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # public weights were trained with these


def start_from(weights: Path) -> Start:
    """Read `weights`: a file, what `livt import` or `livt export` wrote, or a run. Raises WeightsError, RecipeError."""
    path = weights.absolute()
    if is_run(path):
        recipe = load_saved(path / SAVED)
        return Start(str(path), _part(recipe.model), recipe.data.mean, recipe.data.std)
    opened = open_weights(path)
    model = infer_model(opened.state, heads=opened.heads, decoder_heads=opened.decoder_heads)
    mean, std = IMAGENET if model.channels == len(IMAGENET[0]) else (None, None)
    return Start(str(path), _part(model), mean, std)


def _part(model: Model) -> dict[str, Any]:
    """The part `model` of a recipe for fine-tuning: without the decoder, and without what the size gives."""
    given = model.model_dump(exclude={"decoder"}, exclude_none=True)
    return {"size": given.pop("size")} | given
