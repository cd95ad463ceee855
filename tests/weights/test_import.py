"""Wrong, hostile and other-sized files: refused by name, or made to fit as it is told."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from livt_scale.config.recipe import Model
from livt_scale.models.classifier import build_classifier
from livt_scale.util.errors import LivtError, UsageError, WeightsError
from livt_scale.weights.adapt import adapt, start_classifier
from livt_scale.weights.importer import import_weights, open_weights
from tests.weights.small_mae import official_state
from tests.weights.test_parity import DIMS, MODEL


def saved(folder: Path, state: dict[str, Tensor], name: str = "given.safetensors") -> Path:
    save_file({k: v.contiguous() for k, v in state.items()}, folder / name)
    return folder / name


def bring(path: Path, **options: object) -> dict[str, object]:
    return import_weights(path, path.parent / "out", heads=4, decoder_heads=2, **options)  # type: ignore[arg-type]


class Marks:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_code_in_a_pickle_is_never_run(tmp_path: Path, zipped: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    torch.save({"model": official_state(), "args": Marks(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"refused.*system.*Nothing in it was executed"):
        bring(path)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    torch.load(path, weights_only=False)  # the file is armed: read with code enabled, it does leave its mark
    assert marker.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_prefixes_of_ddp_and_of_compiling_are_removed(tmp_path: Path, suffix: str) -> None:
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in official_state().items()}
    if suffix == ".pth":
        torch.save({"model": wrapped}, tmp_path / "given.pth")
    else:
        saved(tmp_path, wrapped)
    assert open_weights(tmp_path / f"given{suffix}").state.keys() == official_state().keys()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_cut_file_is_named(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        torch.save({"model": official_state()}, path)
    else:
        saved(tmp_path, official_state(), path.name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(WeightsError, match=path.name):
        bring(path)


def test_a_header_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(WeightsError, match=r"huge\.safetensors cannot be read"):
        bring(path)


def changed(**tensors: Tensor | None) -> dict[str, Tensor]:
    state = official_state() | {name.replace("__", "."): t for name, t in tensors.items() if t is not None}
    return {name: t for name, t in state.items() if tensors.get(name.replace(".", "__"), 0) is not None}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (changed(blocks__1__mlp__fc1__bias=None), r"blocks\.1\.mlp\.fc1\.bias is missing"),
        (changed(blocks__1__mlp__fc1__bias=torch.zeros(7)), r"fc1\.bias is \[7\], the model's \[128\]"),
        (changed(patch_embed__proj__weight=torch.zeros(32, 48)), "should have 4 dimensions"),
        (changed(blocks__0__ls1__gamma=torch.zeros(32)), r"1 of \d+ tensors have no place.*ls1\.gamma"),
        (changed(blocks__0__atn__qkv__bias=torch.zeros(96)), r"did you mean 'blocks\.0\.attn\.qkv\.bias'"),
        (changed(norm__bias=torch.full((32,), float("nan"))), r"NaN or infinity in 1 tensors.*norm\.bias"),
        (changed(norm__bias=torch.full((32,), float("inf"))), "NaN or infinity"),
        (changed(norm__bias=torch.zeros(32, dtype=torch.int64)), r"norm\.bias is torch\.int64"),
        (changed(pos_embed=torch.zeros(1, 14, 32)), "14 positions"),
        (changed(decoder_blocks__0__norm1__weight=None), r"decoder_blocks\.0\.norm1\.weight is missing"),
        ({"bn1.num_batches_tracked": torch.tensor(7)}, "a CNN: livt import reads ViTs"),
        (changed(mask_token=None, head__weight=torch.zeros(0, 32)), r"head\.weight has the shape \[0, 32\], not \[cl"),
        (changed(mask_token=None, head__weight=torch.tensor(3.0)), r"head\.weight has the shape \[\], not \[classes"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(9)}, r"no ViT.*'conv1\.weight'"),
        ({}, "no ViT"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:20],
)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path: Path, state: dict[str, Tensor], said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        bring(saved(tmp_path, state))
    assert not (tmp_path / "out").exists()


def test_a_dict_of_something_else_and_an_unknown_suffix_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"weight": 3}}, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match="not a dict of tensors: it holds weight"):
        bring(tmp_path / "odd.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({}))
    with pytest.raises(WeightsError, match=r"\.pkl is no known kind"):
        bring(tmp_path / "plain.pkl")
    with pytest.raises(WeightsError, match="there is no"):
        bring(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="did you mean 'mae'"):
        bring(saved(tmp_path, official_state()), layout="mea")
    with pytest.raises(WeightsError, match="names are those of 'mae'"):
        bring(saved(tmp_path, official_state()), layout="hf")


def test_positions_go_to_another_grid_as_timm_does_it(tmp_path: Path) -> None:
    report = bring(saved(tmp_path, official_state()), image_px=28)
    given, state = official_state()["pos_embed"], load_file(tmp_path / "out/model.safetensors")
    wanted = resample_abs_pos_embed(given, [7, 7], [4, 4], num_prefix_tokens=1, antialias=False)
    torch.testing.assert_close(state["pos_embed"], wanted)
    assert torch.equal(state["pos_embed"][:, 0], given[:, 0])
    assert report["changed"]["pos_embed"] == "grid 4 x 4 -> 7 x 7, bicubic"  # type: ignore[index]


def test_four_channels_and_one_keep_the_answer_to_equal_channels() -> None:
    given = official_state()["patch_embed.proj.weight"]
    for channels in (1, 4, 7):
        state, told = adapt(official_state(), Model.model_validate(MODEL.model_dump() | {"channels": channels}))
        projection = state["patch_embed.proj.weight"]
        assert projection.shape == (32, channels, 4, 4)
        if channels == 1:
            torch.testing.assert_close(projection[:, 0], given.sum(1))
        else:
            torch.testing.assert_close(projection[:, 3], given[:, 0] * 3 / channels)
        assert told == {"patch_embed.proj.weight": f"channels 3 -> {channels}"}
        assert "decoder_pred.weight" not in state


def test_another_patch_size_answers_alike_to_a_resized_patch(tmp_path: Path) -> None:
    report = bring(saved(tmp_path, official_state()), patch_px=8, image_px=32)
    state = load_file(tmp_path / "out/model.safetensors")
    patch = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    resized = torch.nn.functional.interpolate(patch, size=(8, 8), mode="bicubic", antialias=True)
    before = torch.nn.functional.conv2d(patch, official_state()["patch_embed.proj.weight"])
    after = torch.nn.functional.conv2d(resized, state["patch_embed.proj.weight"])
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)
    assert report["made"] == ("decoder_pred.weight", "decoder_pred.bias")


def test_timms_classifier_gives_its_logits_here_and_the_head_is_kept_only_for_as_many_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5, global_pool="avg"
    ).eval()
    with torch.no_grad():
        theirs.head.weight.normal_()
    report = bring(saved(tmp_path, theirs.state_dict()))
    assert report["num_classes"] == 5
    assert report["source"]["layout"] == "timm"  # type: ignore[index]
    weights = open_weights(tmp_path / "out")
    shape = Model.model_validate(DIMS)
    ours = build_classifier(shape, num_classes=5, drop_path=0.0).eval()
    taken = start_classifier(ours, weights.state, shape, keep_head=True)
    assert taken.made == taken.left == ()
    images = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    other = build_classifier(shape, num_classes=6, drop_path=0.0)
    with pytest.raises(WeightsError, match="of 5 classes, the data have 6"):
        start_classifier(other, weights.state, shape, keep_head=True)
    before = other.head.weight.clone()
    assert start_classifier(other, weights.state, shape, keep_head=False).made == (
        "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias",
    )  # fmt: skip
    assert torch.equal(other.head.weight, before)
    with pytest.raises(LivtError, match=r"4 heads, the model 8"):
        weights.check_heads(Model.model_validate(DIMS | {"heads": 8}))


def test_a_changed_import_and_a_folder_that_is_there_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, official_state())
    bring(path)
    with pytest.raises(UsageError, match="is there already"):
        bring(path)
    saved(tmp_path / "out", official_state(seed=1), "model.safetensors")
    with pytest.raises(WeightsError, match=r"is not what weights\.json says"):
        open_weights(tmp_path / "out")
