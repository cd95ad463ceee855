"""The worst confusions as one HTML file: which class is mistaken for which, with the images.

The file is self-contained: images are data URIs, there are no scripts and no external links, and its content policy
forbids the browser to load anything. Class names are untrusted, so every text passes jinja2's autoescape, and invisible
characters and those that change the text direction are shown as their numbers. The page is light or dark as the
reader's system is set, and has headings, lists and alternative texts for screen readers.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from numpy.typing import NDArray
from PIL import Image

from livt_scale.data.image.decode import BadImage, decode
from livt_scale.data.reader import SampleReader
from livt_scale.data.shard_set import ShardSet
from livt_scale.evaluation.gallery_page import PAGE
from livt_scale.evaluation.logits import Outputs
from livt_scale.evaluation.per_class import predictions
from livt_scale.util.atomic import write_atomic
from livt_scale.util.errors import DataError
from livt_scale.util.text import visible

PAIRS, PER_PAIR = 20, 6
IMAGE_PX = 160  # longer side, at most
MAX_BYTES = 4_500_000  # of the file; images beyond it are left out, and the page has their number
LOSSLESS_PX = 64  # images of at most this size per side are stored losslessly; larger ones become JPEG


@dataclass(frozen=True)
class Confusion:
    """Images of class `true` that are taken for class `predicted`; rows of the set, the surest mistake first."""

    true: int
    predicted: int
    count: int
    share: float  # of the images of the true class
    rows: tuple[int, ...]
    confidence: tuple[float, ...]


def worst(outputs: Outputs, *, pairs: int = PAIRS, per_pair: int = PER_PAIR) -> list[Confusion]:
    """The pairs of classes with the largest shares of the true class; of equal ones the surer mistake."""
    found, labels = predictions(outputs), outputs.labels.numpy()
    num = len(outputs.about.class_names)
    images = np.bincount(labels, minlength=num)
    wrong = np.flatnonzero(found.classes != labels)
    wrong = wrong[np.argsort(-found.confidence[wrong], kind="stable")]
    codes = labels[wrong] * num + found.classes[wrong]
    order = np.argsort(codes, kind="stable")  # within a pair still the surest first
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    confusions = []
    for rows in np.split(wrong[order], starts[1:]) if len(wrong) else []:
        true, predicted = int(labels[rows[0]]), int(found.classes[rows[0]])
        shown = rows[:per_pair]
        sure = tuple(float(v) for v in found.confidence[shown])
        share = len(rows) / int(images[true])
        confusions.append(Confusion(true, predicted, len(rows), share, tuple(int(r) for r in shown), sure))
    confusions.sort(key=lambda c: (-c.share, -c.confidence[0], c.true, c.predicted))
    return confusions[:pairs]


def write_gallery(outputs: Outputs, shards: ShardSet, path: Path, *, most_bytes: int = MAX_BYTES) -> int:
    """Write the page of `outputs`, whose images are those of `shards`; the number of images in it.

    Raises DataError where `shards` are not the set that was evaluated, and what reading it raises.
    """
    digest = outputs.about.facts["data"]["manifest_digest"]
    if shards.digest != digest:
        raise DataError(
            f"{shards.where} is not the set that was evaluated: manifest {shards.digest[:12]}, not {digest[:12]}",
            remedy="give the folder of that set with --data",
        )
    confusions = worst(outputs)
    rows = [row for c in confusions for row in c.rows]
    pictures = _within(_pictures(shards, outputs, sorted(rows)), rows, most_bytes)
    write_atomic(path, page(outputs, confusions, pictures.get).encode("utf-8", errors="backslashreplace"))
    return len(pictures)


def page(outputs: Outputs, confusions: Sequence[Confusion], picture: Callable[[int], str | None]) -> str:
    """The HTML; `picture`: a row of the set to its data URI, or None where it is left out."""
    about = outputs.about
    names = [visible(name) for name in about.class_names]
    sections = []
    for number, c in enumerate(confusions, start=1):
        pairs = zip(c.rows, c.confidence, strict=True)
        shown = [{"key": visible(outputs.keys[r]), "sure": s, "uri": picture(r)} for r, s in pairs]
        sections.append(
            {
                "number": number,
                "true": names[c.true],
                "predicted": names[c.predicted],
                "count": c.count,
                "share": c.share,
                "train_images": about.class_counts[c.true],
                "predicted_train_images": about.class_counts[c.predicted],
                "images": [image for image in shown if image["uri"]],
                "left_out": sum(not image["uri"] for image in shown),
            }
        )
    found = predictions(outputs).classes == outputs.labels.numpy()
    facts: dict[str, Any] = {"images": len(found), "wrong": int((~found).sum()), "classes": len(names)}
    weights = about.facts.get("weights", {})
    source = visible(f"{weights.get('checkpoint', '?')} of {weights.get('read_from', '?')}")
    data = visible(str(about.facts["data"]["folder"]))
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    return template.render(sections=sections, facts=facts, source=source, data=data)


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """uint8 [H, W, 3] as an image of at most IMAGE_PX a side: PNG where it is small, else JPEG."""
    image = Image.fromarray(pixels)
    buffer, kind = io.BytesIO(), "png"
    if max(image.size) > LOSSLESS_PX:
        kind = "jpeg"
        image.thumbnail((IMAGE_PX, IMAGE_PX), Image.Resampling.LANCZOS)
    image.save(buffer, kind, **({"quality": 82} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pictures(shards: ShardSet, outputs: Outputs, rows: list[int]) -> dict[int, str]:
    usable = shards.usable_to_sample(np.arange(shards.num_samples, dtype=np.int64))
    number_of = dict(zip(shards.keys(usable), usable.tolist(), strict=True))  # `outputs` may be a part of the set
    samples = np.asarray([number_of[outputs.keys[row]] for row in rows], dtype=np.int64)
    reader, uris = SampleReader(shards), {}
    try:
        for row, raw in zip(rows, reader.read(samples) if rows else [], strict=True):
            try:
                uris[row] = data_uri(decode(raw.image))
            except BadImage as error:
                raise raw.error(str(error)) from error
    finally:
        reader.close()
    return uris


def _within(uris: dict[int, str], order: list[int], most_bytes: int) -> dict[int, str]:
    """The images that fit, the worst pairs' first."""
    room, kept = most_bytes - 200_000, {}  # what is left is for the text
    for row in order:
        if len(uris[row]) <= room:
            room -= len(uris[row])
            kept[row] = uris[row]
    return kept
