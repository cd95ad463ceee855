"""Runs a trained model on images without labels, a folder of them or one: a CSV with the likeliest classes of each.

    summary = predict(open_trained(Path("exports/try")), Path("photos"), Path("photos.csv"), top_k=3)

    file,error,number_1,class_1,probability_1,number_2,…
    trip/a.jpg,,4,coat,0.812345,2,…
    trip/b.jpg,the JPEG is cut or damaged: …,,,,

Images are read by the training decoder and cropped by the evaluation transform, so an image from a shard gets the same
prediction here as in `livt eval`. Only the weights are needed: no run directory, no shards. Rows are in the order of
the paths; the file is written while the images are processed, and gets its name when it is complete.
"""

from __future__ import annotations

import csv
import io
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from livt_scale.api.predictor import Predictor, most_likely, read_image_file
from livt_scale.config.recipe import Recipe
from livt_scale.data.image.decode import BadImage
from livt_scale.data.image.transforms import EvalTransform
from livt_scale.data.num_workers import cores_for_rank
from livt_scale.data.settings import ImageSettings
from livt_scale.evaluation.evaluate import BATCH
from livt_scale.evaluation.tta import Views
from livt_scale.posthoc.predict_inputs import images_at
from livt_scale.train.load_trained import Trained
from livt_scale.util.atomic import new_file
from livt_scale.util.errors import SampleError

_log = logging.getLogger(__name__)
MAX_WORKERS = 8
MAX_SHOWN = 100  # bad images that the summary names; the CSV names all
PROGRESS_S = 10.0
COLUMNS = ("number", "class", "probability")  # for each of the top k


@dataclass(frozen=True)
class Prediction:
    """How logits become probabilities: softmax((z - τ · margin) / T), cut to the `top_k` largest.

    temperature: T; None: the fitted one that comes with the weights, else 1.
    """

    top_k: int = 5
    tau: float = 0.0
    temperature: float | None = None
    views: Views = Views()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class _Row:
    """error: why there is no prediction. top: (class number, probability), the likeliest first."""

    file: str
    error: str = ""
    top: tuple[tuple[int, float], ...] = ()


def predict(
    trained: Trained,
    images: Path,
    out: Path,
    *,
    how: Prediction = Prediction(),
    skip_bad: bool = False,
    batch: int = BATCH,
    workers: int | None = None,
) -> dict[str, Any]:
    """Write the CSV of the images in the folder `images`, or of that one file, to `out`; the summary as JSON values.

    skip_bad: a file that is no image is a row with its error; else SampleError, and nothing is written. workers:
    decoding processes; None: as many as the machine has cores, up to 8. Raises DataError where there is no image.
    """
    predictor = Predictor(trained, tau=how.tau, temperature=how.temperature)
    given = how.temperature is not None
    _log.info("predict: %s", f"temperature {how.temperature:g}, as given" if given else trained.calibration)
    folder, files, others = images_at(images)
    names, counts, bad, sure = predictor.class_names, Counter[int](), list[dict[str, str]](), 0.0
    rows = _rows(predictor, trained.recipe, folder, files, how=how, batch=batch, workers=workers)
    out.parent.mkdir(parents=True, exist_ok=True)
    with new_file(out) as file, _text(file) as text:
        writer = csv.writer(text)
        top_k = min(how.top_k, len(names))
        writer.writerow(["file", "error", *(f"{w}_{k + 1}" for k in range(top_k) for w in COLUMNS)])
        for row in _with_progress(rows, len(files)):
            if row.error:
                bad.append({"file": row.file, "error": row.error})
                if not skip_bad:
                    raise SampleError(
                        f"{folder / row.file}: {row.error}",
                        remedy="take it away, or give --skip-bad to have it in the CSV with its error",
                    )
            else:
                counts[row.top[0][0]] += 1
                sure += row.top[0][1]
            writer.writerow([row.file, row.error, *(v for c, p in row.top for v in (c, names[c], f"{p:.6f}"))])
    predicted = len(files) - len(bad)
    return {
        "out": str(out),
        "images": len(files),
        "predicted": predicted,
        "other_files": others,
        "bad": len(bad),
        "bad_files": bad[:MAX_SHOWN],
        "mean_confidence": sure / predicted if predicted else None,
        "classes": {names[c]: n for c, n in sorted(counts.items())},
        "tau": how.tau,
        "temperature": predictor.temperature,
        "calibration": trained.calibration.model_dump(mode="json", exclude_none=True),
        "views": how.views.facts(),
        "weights": trained.weights,
    }


class _Images(Dataset[tuple[str, Tensor | str]]):
    """File number i: (its path, uint8 [crops, C, T, T] or what is wrong with it)."""

    def __init__(self, folder: Path, files: list[str], recipe: Recipe, *, crops: int) -> None:
        self._folder, self._files = folder, files
        self._shape = (crops, recipe.model.image_px, recipe.model.image_px, recipe.model.channels)
        self._transform = EvalTransform(ImageSettings.of_recipe(recipe))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> tuple[str, Tensor | str]:
        slots = torch.empty(self._shape, dtype=torch.uint8).permute(0, 3, 1, 2)
        try:
            self._transform.crops(read_image_file(self._folder / self._files[i]), slots)
        except BadImage as error:
            return self._files[i], str(error)
        except OSError as error:
            return self._files[i], f"cannot be read: {error.strerror}"
        return self._files[i], slots


@contextmanager
def _text(file: BinaryIO) -> Iterator[io.TextIOWrapper]:
    """`file` for UTF-8 text; it stays open, because the caller syncs it. Undecodable bytes appear as \\udcXX."""
    text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
    try:
        yield text
    finally:
        text.detach()  # what is still in its buffer is written


def _rows(
    predictor: Predictor,
    recipe: Recipe,
    folder: Path,
    files: list[str],
    *,
    how: Prediction,
    batch: int,
    workers: int | None,
) -> Iterator[_Row]:
    """A row for each of `files`, in their order."""
    most = min(cores_for_rank(1), MAX_WORKERS) if workers is None else workers
    images = _Images(folder, files, recipe, crops=how.views.crops)
    num_workers = min(most, len(files) // batch)  # a single batch is decoded here
    loader = DataLoader(images, batch, num_workers=num_workers, collate_fn=list, generator=torch.Generator())
    for items in loader:
        good = [pixels for _, pixels in items if isinstance(pixels, Tensor)]
        tops: list[list[tuple[int, float]]] = []
        if good:
            pixels = torch.cat(good).to(predictor.device)
            logits = how.views.logits(predictor.logits, pixels, recipe.data)
            tops = most_likely(predictor.probabilities(logits), how.top_k)
        for file, read in items:
            if isinstance(read, Tensor):
                yield _Row(file, top=tuple(tops.pop(0)))
            else:
                yield _Row(file, error=read)


def _with_progress(rows: Iterable[_Row], total: int) -> Iterator[_Row]:
    """`rows`, with a line of progress every PROGRESS_S seconds."""
    logged = time.monotonic()
    for done, row in enumerate(rows):
        if time.monotonic() - logged > PROGRESS_S:
            logged = time.monotonic()
            _log.info("predict: %s of %s images", f"{done:,}", f"{total:,}")
        yield row
