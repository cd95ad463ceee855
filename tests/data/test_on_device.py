"""JPEGs that the main process decodes: the same crops, whatever decodes them, and nothing lost where it refuses.

nvJPEG itself needs a GPU (the last test); everywhere else torchvision's decoder of the CPU stands in its place.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from livt_scale.data import loader, on_device
from livt_scale.data.batch import Batch
from livt_scale.data.image import transforms
from livt_scale.data.image.decode import open_image
from livt_scale.data.loader import train_batches
from livt_scale.data.manifest import ShardSet
from livt_scale.util.errors import DataError, SampleError, UsageError
from tests.data.tiny_sets import encoded, photo, tiny_recipe, tiny_set

CPU = torch.device("cpu")
GPU_DECODE = {"data__decode": "gpu"}
PLAIN_FINETUNE = {"stages__finetune__rand_augment": None, "stages__finetune__random_erasing": 0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return tiny_set(tmp_path_factory.mktemp("on device") / "set", num_samples=27)  # every fourth is a PNG


@pytest.fixture
def _as_if_there_were_a_gpu(monkeypatch):
    monkeypatch.setattr(loader, "check_gpu", lambda: None)


def load(shards: ShardSet, stage: str = "pretrain", **changes) -> list[Batch]:
    recipe = tiny_recipe(shards.folder, **changes)
    where = {"rank": 0, "world_size": 1, "micro_batch": 8, "epoch": 0, "step": 0}
    with train_batches(shards, recipe, stage=stage, **where) as batches:
        return list(batches)


def assert_same_levels(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The CPU rounds to 8 bits after each of two passes, the device once: one level apart, hardly ever two."""
    apart = (ours.int() - theirs.int()).abs()
    assert apart.max() <= 2
    assert (apart > 1).float().mean() < 0.01


@pytest.mark.parametrize(("stage", "changes"), [("pretrain", {}), ("finetune", PLAIN_FINETUNE)])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.usefixtures("_as_if_there_were_a_gpu")
def test_batches_are_those_that_loader_processes_decode(shards, stage, changes, workers, monkeypatch):
    monkeypatch.setattr(transforms, "SHRINKS", ())  # a device decodes in full
    usual = load(shards, stage, **changes)
    ours = load(shards, stage, **changes, **GPU_DECODE, data__workers=workers)  # all held: no block is filled twice
    assert len(usual) == len(ours) == 9
    for theirs, raw in zip(usual, ours, strict=True):
        is_png = [int(key[1:]) % 4 == 3 for key in raw.keys]
        assert [size == 0 for size in raw.encoded.sizes.tolist()] == is_png
        assert raw.images.shape == (sum(is_png), 3, 32, 32)
        batch = raw.to("cpu")
        assert (batch.keys, batch.epoch, batch.step, batch.encoded) == (theirs.keys, theirs.epoch, theirs.step, None)
        for name in ("labels", "noise", "drop"):
            one, other = getattr(batch, name), getattr(theirs, name)
            assert one is other is None or torch.equal(one, other)
        assert torch.equal(batch.images[torch.tensor(is_png)], theirs.images[torch.tensor(is_png)])
        assert_same_levels(batch.images, theirs.images)


def test_photographs_are_pillow_s_bicubic_to_a_stated_tolerance():
    from skimage import data

    jpegs = [encoded(data.chelsea()), encoded(data.coffee()), encoded(data.rocket())]
    views = [transforms.View(open_image(j, channels=3), transforms.Box(20, 31, 260, 333), True) for j in jpegs]
    fields = {name: torch.from_numpy(array.copy()) for name, array in on_device.encoded_arrays(jpegs, views).items()}
    none_here = torch.empty((0, 3, 224, 224), dtype=torch.uint8)
    ours = on_device.decode_on(CPU, on_device.Encoded(**fields), none_here, ["a", "b", "c"])
    for made, jpeg in zip(ours, jpegs, strict=True):
        crop = Image.open(io.BytesIO(jpeg)).crop((31, 20, 31 + 333, 20 + 260))
        theirs = crop.resize((224, 224), Image.Resampling.BICUBIC).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        apart = (made.int() - torch.from_numpy(np.array(theirs)).permute(2, 0, 1).int()).abs().float()
        assert apart.max() <= 8  # Pillow cuts off between its two passes what overshoots; floats do so once: 5 here
        assert (apart > 1).float().mean() < 1e-3
        assert apart.mean() < 0.3


def test_what_decoders_do_not_all_read_alike_stays_with_the_loader_process():
    turned = Image.Exif()
    turned[0x0112] = 6
    cmyk = io.BytesIO()
    Image.fromarray(photo(40, 50)).convert("CMYK").save(cmyk, "JPEG")
    colour = encoded(photo(40, 50))
    assert open_image(colour, channels=3).is_plain
    for other in (
        encoded(photo(40, 50), "PNG"),
        encoded(photo(40, 50), exif=turned),
        encoded(photo(40, 50)[:, :, 0]),
        encoded(photo(40, 50), progressive=True),
        cmyk.getvalue(),
        colour[:-2],
    ):
        assert not open_image(other, channels=3).is_plain


@pytest.mark.usefixtures("_as_if_there_were_a_gpu")
def test_what_the_decoder_refuses_the_cpu_decodes_one_by_one(shards, monkeypatch):
    raw = load(shards, **GPU_DECODE)[0]
    expected, asked = raw.to("cpu").images, []

    def picky(jpegs, device):
        asked.append(len(jpegs))
        if len(jpegs) > 1 or len(jpegs[0]) % 2:
            raise RuntimeError("nvjpegDecode failed: 9")
        return on_device._by_torchvision(jpegs, device)

    monkeypatch.setitem(on_device.DECODERS, "cpu", picky)
    assert torch.equal(raw.to("cpu").images, expected)
    num_jpegs = int((raw.encoded.sizes > 0).sum())
    assert asked == [num_jpegs] + [1] * num_jpegs


@pytest.mark.usefixtures("_as_if_there_were_a_gpu")
def test_memory_that_is_out_is_no_refusal(shards, monkeypatch):
    def full(jpegs, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(on_device.DECODERS, "cpu", full)
    with pytest.raises(torch.OutOfMemoryError):
        load(shards, **GPU_DECODE)[0].to("cpu")


@pytest.mark.usefixtures("_as_if_there_were_a_gpu")
def test_a_few_are_decoded_at_a_time_where_they_are_large(shards, monkeypatch):
    raw = load(shards, **GPU_DECODE)[0]
    expected, asked = raw.to("cpu").images, []

    def counting(jpegs, device):
        decoded = on_device._by_torchvision(jpegs, device)
        asked.append(sum(pixels.numel() for pixels in decoded))
        return decoded

    monkeypatch.setitem(on_device.DECODERS, "cpu", counting)
    monkeypatch.setattr(on_device, "AT_ONCE_BYTES", 30_000)
    assert torch.equal(raw.to("cpu").images, expected)
    assert len(asked) > 1
    assert max(asked) <= 30_000
    monkeypatch.setattr(on_device, "AT_ONCE_BYTES", 1)  # larger than all that is allowed: alone
    assert torch.equal(raw.to("cpu").images, expected)


@pytest.mark.usefixtures("_as_if_there_were_a_gpu")
def test_damage_is_told_with_its_sample(tmp_path, shards):
    cut = tiny_set(tmp_path / "cut", num_samples=27, half=(0, 5))
    with pytest.raises(SampleError, match=r"part-00\d\.tar, byte \d+, sample 's00[05]': the JPEG is cut or damaged"):
        load(cut, **GPU_DECODE)  # no end mark: its loader process looks
    batch = load(shards, **GPU_DECODE)[0]
    first = next(k for k, size in enumerate(batch.encoded.sizes.tolist()) if size)
    batch.encoded.jpegs = batch.encoded.jpegs.clone()
    batch.encoded.jpegs[30 : int(batch.encoded.sizes[first])] = 0xC4
    with pytest.raises(DataError, match=rf"sample '{batch.keys[first]}': .*JPEG"):
        batch.to("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_before_anything_is_read(shards):
    with pytest.raises(UsageError, match=r"data\.decode is gpu, and torch sees no GPU"):
        load(shards, **GPU_DECODE)


def test_fine_tuning_with_randaugment_decodes_where_it_augments(shards):
    usual, ours = load(shards, "finetune"), load(shards, "finetune", **GPU_DECODE)  # needs no GPU
    assert all(batch.encoded is None for batch in ours)
    assert all(torch.equal(a.images, b.images) for a, b in zip(usual, ours, strict=True))


def test_a_recipe_that_gives_a_gpu_nothing_to_decode_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="RandAugment and erasing change pixels on the CPU"):
        tiny_recipe(tmp_path, stages__pretrain=None, stages__finetune__init="scratch", **GPU_DECODE)
    norm = {"data__mean": [0.5], "data__std": [0.5], "model__channels": 1}
    with pytest.raises(ValidationError, match="reads colour alone"):
        tiny_recipe(tmp_path, **norm, **GPU_DECODE)


@pytest.mark.usefixtures("_as_if_there_were_a_gpu")
def test_what_is_held_ready_counts_the_jpegs(shards):
    recipes = [tiny_recipe(shards.folder, **changes) for changes in ({}, GPU_DECODE)]
    where = {"rank": 0, "world_size": 1, "micro_batch": 8, "epoch": 0, "step": 0}
    usual, ours = (train_batches(shards, recipe, stage="pretrain", **where) for recipe in recipes)
    with usual, ours:
        mean = sum(shard.bytes for shard in shards.manifest.shards) // shards.num_samples
        assert ours.loading.batch_bytes == pytest.approx(usual.loading.batch_bytes + 8 * mean, abs=8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nvJPEG needs a GPU")
def test_nvjpeg_gives_the_crops_of_the_cpu(shards, monkeypatch):
    monkeypatch.setattr(transforms, "SHRINKS", ())
    for theirs, raw in zip(load(shards), load(shards, **GPU_DECODE, data__workers=2), strict=True):
        batch = raw.to("cuda")
        assert batch.images.device.type == "cuda"
        apart = (batch.images.cpu().int() - theirs.images.int()).abs().float()
        assert apart.mean() < 2  # another inverse DCT, another way to spread colours
