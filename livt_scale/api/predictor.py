"""`livt.load`: a trained classifier, from a run or an export, to call with images.

    predictor = load("runs/fashion-mnist-lt-quickstart")
    predictor(["photo.png"]).top(3)                    # [[("coat", 0.81), ("pullover", 0.12), ("shirt", 0.05)]]

An image file is decoded and cropped as in evaluation, so an image of a shard gets the same logits as in `livt eval`.
`livt predict` is a client of it (`livt_scale.posthoc.predict`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from livt_scale.api.arguments import device_of
from livt_scale.data.build.stored import image_kind, stored
from livt_scale.data.image.decode import BadImage, Pixels, pillow_pixels
from livt_scale.data.image.transforms import EvalTransform
from livt_scale.data.loader import normalise
from livt_scale.data.settings import ImageSettings
from livt_scale.distributed import precision
from livt_scale.distributed.world import World
from livt_scale.evaluation.adjust import adjust
from livt_scale.train.load_trained import Trained, Weights
from livt_scale.train.open_trained import open_trained
from livt_scale.util.errors import SampleError, UnusableImage, UsageError
from livt_scale.util.outside import RefusedFile, read_checked

CONVERTED = ("tiff", "gif", "ppm")  # kinds that the training decoder does not read: shards hold PNG or JPEG of them

AnyImage = str | Path | Image.Image | Tensor | NDArray[Any]


def load(
    path: str | Path,
    *,
    checkpoint: str | int | None = None,
    weights: Weights = "raw",
    tau: float = 0.0,
    temperature: float | None = None,
    device: torch.device | str | None = None,
) -> Predictor:
    """The classifier of a run directory or of an export, ready to be called with images.

    checkpoint: of a run, "best", "newest" or a step; None: the final one. weights: "raw", or "ema" for the moving
    average, if the run kept one. tau: how many times the logarithm of the training prior is subtracted from the logits.
    temperature: divides the logits; None: the fitted one that comes with the weights, else 1. device: None: a GPU
    if there is one.

    Raises UsageError (neither a run nor an export; a value out of range), RunError (fine-tuning has not finished),
    ExportError, CheckpointDamaged and CheckpointMismatch: every byte of the weights is checked.
    """
    if weights not in get_args(Weights):
        raise UsageError(f"weights is {weights!r}", remedy="give raw or ema")
    which = None if checkpoint is None else str(checkpoint)
    trained = open_trained(Path(path), which=which, weights=weights)
    return Predictor(trained, tau=tau, temperature=temperature, device=device)


@dataclass(frozen=True)
class Predicted:
    """What a `Predictor` returns for N images: `probabilities`, float32 [N, C] on the CPU, and `class_names` [C]."""

    probabilities: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.probabilities)

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image its `k` likeliest classes as (name, probability), the likeliest first."""
        return [[(self.class_names[c], p) for c, p in row] for row in most_likely(self.probabilities, k)]


class ImageTransform:
    """One image to the model's input, float32 [C, T, T], normalised: resized and cropped as in evaluation.

    Takes the path of an image file, a PIL image, pixels uint8 [C, H, W], or its own output, which it returns
    unchanged; pixels and output as tensors or NumPy arrays. Raises SampleError (an image that is damaged or not of 8
    or 16 bits, a file that is no image) and UsageError (anything else).
    """

    def __init__(self, settings: ImageSettings) -> None:
        self._settings = settings
        self._cut = EvalTransform(settings)
        self._shape = (settings.channels, settings.image_px, settings.image_px)

    def __call__(self, image: AnyImage) -> Tensor:
        image = _as_tensor(image)
        if isinstance(image, Tensor) and image.is_floating_point() and tuple(image.shape) == self._shape:
            return image.float()
        channels, px, _ = self._shape
        slots = torch.empty((1, px, px, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
        if isinstance(image, Image.Image):
            self._cut.crops_of(_pixels_of(image, channels), slots)
        elif isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == channels:
            self._cut.crops_of(image.permute(1, 2, 0).cpu().numpy(), slots)
        elif isinstance(image, str | Path):
            self._cut_file(Path(image), slots)
        else:
            what = type(image).__name__
            if isinstance(image, Tensor | np.ndarray):
                what = f"{list(image.shape)} of {str(image.dtype).removeprefix('torch.')}"
            raise UsageError(
                f"an image is {what}",
                remedy=f"give a path, a PIL image, uint8 [{channels}, H, W] or float [{channels}, {px}, {px}]",
            )
        data = self._settings.data
        return normalise(slots, data.mean, data.std, torch.float32)[0]

    def _cut_file(self, path: Path, slots: Tensor) -> None:
        try:
            self._cut.crops(read_image_file(path), slots)
        except BadImage as error:
            raise SampleError(f"{path}: {error}", remedy="give an image file") from error
        except OSError as error:
            raise SampleError(f"{path} cannot be read: {error.strerror}") from error


class Predictor:
    """A trained classifier. Called with a list of images, it returns their `Predicted`.

    model: the nn.Module in eval(), images float32 [B, C, T, T] to logits [B, classes]. transform: the `ImageTransform`
    of one image. class_names: [classes]. temperature: what divides the logits.
    """

    def __init__(
        self,
        trained: Trained,
        *,
        tau: float = 0.0,
        temperature: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, value in (("tau", tau), ("temperature", temperature)):
            if value is not None and not (isinstance(value, int | float) and isfinite(value)):
                raise UsageError(f"{name} is {value!r}", remedy="give a number")
        self.temperature = (trained.calibration.temperature or 1.0) if temperature is None else temperature
        if self.temperature <= 0:
            raise UsageError(f"temperature is {self.temperature:g}, which divides no logits", remedy="give more than 0")
        self.device = World().device if device is None else device_of(device)
        self.model = trained.model.to(self.device)
        self.class_names = trained.classes.names
        self.transform = ImageTransform(ImageSettings.of_recipe(trained.recipe))
        self._trained, self._tau = trained, tau

    def __call__(self, images: Sequence[AnyImage], *, batch: int = 64) -> Predicted:
        """The probabilities of `images`, `batch` of them at a time; what an image may be: see `ImageTransform`."""
        if isinstance(images, str | Path | Image.Image):
            raise UsageError(f"images is one {type(images).__name__}", remedy="give a list of images")
        if batch < 1:
            raise UsageError(f"batch is {batch}", remedy="give 1 or more")
        found = [torch.zeros(0, len(self.class_names))]
        for first in range(0, len(images), batch):
            inputs = torch.stack([self.transform(image) for image in images[first : first + batch]])
            found.append(self.probabilities(self.logits(inputs.to(self.device))).float())
        return Predicted(torch.cat(found), self.class_names)

    def logits(self, inputs: Tensor) -> Tensor:
        """Float [B, classes] of `inputs` float32 [B, C, T, T] on the model's device, without gradients."""
        with torch.inference_mode():
            logits: Tensor = precision.infer(self.model, self.device, self._trained.recipe.parallel.precision, inputs)
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """softmax((logits - tau · margin) / temperature): float64 [B, classes] on the CPU."""
        adjusted = self._adjusted(logits.float()) if self._tau else logits
        return (adjusted.double() / self.temperature).softmax(dim=1).cpu()

    def _adjusted(self, logits: Tensor) -> Tensor:
        finetune = self._trained.recipe.stages.finetune
        assert finetune is not None
        loss, counts = finetune.loss, self._trained.classes.counts
        return adjust(logits, self._tau, loss=loss.name, class_counts=counts, logit_scale=loss.logit_scale)


def _as_tensor(image: AnyImage) -> AnyImage:
    """An array of pixels or of floats as a tensor; anything else as it is."""
    if not isinstance(image, np.ndarray) or (image.dtype != np.uint8 and image.dtype.kind != "f"):
        return image
    # a copy: torch takes no reversed, read-only or byte-swapped memory
    return torch.from_numpy(np.array(image, dtype=np.uint8 if image.dtype == np.uint8 else np.float32, order="C"))


def _pixels_of(image: Image.Image, channels: int) -> Pixels:
    try:
        return pillow_pixels(image, channels=channels)
    except BadImage as error:
        raise SampleError(
            f"a PIL image of mode {image.mode}: {error}", remedy="give a complete image of 8 or 16 bits a channel"
        ) from error


def most_likely(probabilities: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """(class number, probability) of the `k` largest in each row, the largest first; of equal ones the lower number."""
    values, numbers = probabilities.sort(dim=1, descending=True, stable=True)
    rows = zip(numbers[:, :k].tolist(), values[:, :k].tolist(), strict=True)
    return [list(zip(n, v, strict=True)) for n, v in rows]


def read_image_file(path: Path) -> bytes:
    """The bytes of a file of bounded size; of TIFF, GIF and PPM the PNG or JPEG that `livt init` makes of it.

    Raises OSError, and BadImage for anything else, such as a pipe or a TIFF that cannot be converted.
    """
    try:
        data = read_checked(path, "image")
        return stored(data)[1] if image_kind(data) in CONVERTED else data
    except RefusedFile as error:
        raise BadImage(error.strerror or "") from error
    except UnusableImage as error:
        raise BadImage(error.message) from error
