"""JPEGs decoded where the model is: nvJPEG decodes, the device crops and resizes, loader processes only read.

    data.decode: gpu
    loader process   reads and checks the bytes, draws the crop and the flip    -> bytes and boxes, in the batch's block
    main process     Batch.to("cuda"): decode_on(...)                           -> uint8 [B, 3, T, T]

For pretraining, and for fine-tuning without RandAugment and erasing: those change pixels in loader processes, which
then decode too. What decoders do not all read alike (PNG, EXIF rotation, grey, CMYK, progressive, no end mark) is
decoded there as ever; what nvJPEG refuses, by the CPU in the main process. The crops are those of the CPU, resized as
floats; pixels differ by a level or two, since each decoder has its own inverse DCT and way to spread colours.
nvJPEG itself has not been tried: the tests put a decoder of the CPU in its place.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from livt_scale.data.image.decode import BadImage, decode
from livt_scale.data.image.transforms import View
from livt_scale.util.errors import DataError, UsageError

AT_ONCE_BYTES = 1 << 28  # of decoded pixels on the device: seven photographs of 12 megapixels
GEOMETRY = 7  # numbers an image: height and width, the crop's top, left, height and width, is it mirrored?

Decoder = Callable[[list[Tensor], torch.device], list[Tensor]]


@dataclass
class Encoded:
    """The images of a batch of B that are still JPEGs."""

    jpegs: Tensor  # uint8 [bytes], one after the other
    sizes: Tensor  # int64 [B] bytes of each; 0: decoded by its loader process
    geometry: Tensor  # int64 [B, GEOMETRY]


def encoded_arrays(jpegs: list[bytes], views: list[View]) -> dict[str, np.ndarray]:
    """The fields of Encoded for a batch; `jpegs`: b"" for what its loader process decodes."""
    rows = [
        (v.image.height, v.image.width, v.box.top, v.box.left, v.box.height, v.box.width, v.is_mirrored) for v in views
    ]
    return {
        "jpegs": np.frombuffer(bytearray().join(jpegs), dtype=np.uint8),
        "sizes": np.array([len(jpeg) for jpeg in jpegs], dtype=np.int64),
        "geometry": np.array(rows, dtype=np.int64).reshape(len(views), GEOMETRY),
    }


def check_gpu() -> None:
    """Raises UsageError where there is none to decode on."""
    if not torch.cuda.is_available():
        raise UsageError(
            "data.decode is gpu, and torch sees no GPU here", remedy="set data.decode to cpu, or run where there is one"
        )


def decode_on(device: torch.device, encoded: Encoded, images: Tensor, keys: list[str]) -> Tensor:
    """uint8 [B, 3, T, T] on `device`: `images` [n, 3, T, T] in the places whose size is 0, the JPEGs in the others.

    Raises DataError for one that no decoder reads.
    """
    if device.type != "cuda":
        return _decoded(device, encoded, images, keys)
    # torchvision's decoder writes on a stream of its own without waiting for the caller's (pytorch/vision#9606, open in
    # 0.29), into memory that kernels in flight may still read. On a stream that is idle there are none; and when it is
    # idle again, the bytes have been read, so that their block may be filled anew.
    stream, training = _stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        decoded = _decoded(device, encoded, images.to(device), keys)
    stream.synchronize()
    decoded.record_stream(training)
    return decoded


def _decoded(device: torch.device, encoded: Encoded, images: Tensor, keys: list[str]) -> Tensor:
    batch = torch.empty((len(encoded.sizes), *images.shape[1:]), dtype=torch.uint8, device=device)
    sizes = encoded.sizes.tolist()
    batch[[k for k, size in enumerate(sizes) if not size]] = images.to(device)
    jpegs, geometry = encoded.jpegs.split(sizes), encoded.geometry.tolist()
    for group in _groups(sizes, geometry):
        pixels = _pixels([jpegs[k] for k in group], [keys[k] for k in group], device)
        for k, whole in zip(group, pixels, strict=True):
            batch[k] = _crop(whole, *geometry[k][2:], px=images.shape[-1])
    return batch


def _groups(sizes: list[int], geometry: list[list[int]]) -> Iterator[list[int]]:
    """The numbers of the JPEGs, as many at a time as AT_ONCE_BYTES hold, at least one."""
    group: list[int] = []
    room = AT_ONCE_BYTES
    for number, ((height, width, *_), size) in enumerate(zip(geometry, sizes, strict=True)):
        if not size:
            continue
        if group and room < 3 * height * width:
            yield group
            group, room = [], AT_ONCE_BYTES
        group.append(number)
        room -= 3 * height * width
    if group:
        yield group


def _crop(whole: Tensor, top: int, left: int, height: int, width: int, is_mirrored: int, *, px: int) -> Tensor:
    """uint8 [3, px, px] of `whole` [3, H, W], bicubic with antialias."""
    box = whole[None, :, top : top + height, left : left + width].float()
    crop = functional.interpolate(box, size=(px, px), mode="bicubic", antialias=True, align_corners=False)[0]
    return (crop.flip(-1) if is_mirrored else crop).round_().clamp_(0, 255).to(torch.uint8)


def _pixels(jpegs: list[Tensor], keys: list[str], device: torch.device) -> list[Tensor]:
    """uint8 [3, H, W] of each, on `device`. The decoder takes a batch and gives all or nothing: then one by one."""
    decoder = DECODERS[device.type]
    try:
        return decoder(jpegs, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return [_one(jpeg, key, decoder, device) for jpeg, key in zip(jpegs, keys, strict=True)]


def _one(jpeg: Tensor, key: str, decoder: Decoder, device: torch.device) -> Tensor:
    try:
        return decoder([jpeg], device)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # what it refuses
        pass
    try:
        return torch.from_numpy(decode(jpeg.numpy().tobytes(), channels=3)).permute(2, 0, 1).to(device)
    except BadImage as error:
        raise DataError(
            f"sample {key!r}: {error}",
            remedy="`livt shards verify FOLDER --decode --quarantine` lists what is bad and leaves it out",
        ) from error


def _by_torchvision(jpegs: list[Tensor], device: torch.device) -> list[Tensor]:
    """nvJPEG on a GPU, libjpeg-turbo on a CPU. Raises RuntimeError, and then gives nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # since 0.29 it recommends TorchCodec
        decoded: list[Tensor] = decode_jpeg(jpegs, mode=ImageReadMode.RGB, device=device)
    return decoded


DECODERS: dict[str, Decoder] = {"cuda": _by_torchvision, "cpu": _by_torchvision}  # by the device's type

_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device, for decoding alone."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
