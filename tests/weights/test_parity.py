"""Official weights give the official numbers here, and go out again with the same bits."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from livt_scale.config.recipe import Model
from livt_scale.models.mae import MaskedAutoencoder, build_mae
from livt_scale.weights.adapt import start_mae
from livt_scale.weights.importer import import_weights, open_weights
from livt_scale.weights.layouts import to_hf
from tests.weights import small_mae
from tests.weights.small_mae import official_state

DIMS = {"width": 32, "depth": 2, "heads": 4, "patch_px": 4, "image_px": 16}
MODEL = Model.model_validate(DIMS | {"decoder": {"width": 16, "depth": 1, "heads": 2}})


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(3, 3, 16, 16, generator=draw), torch.rand(3, 16, generator=draw)


def official_file(folder: Path) -> Path:
    """As main_pretrain.py saves: weights, optimizer, epoch, arguments."""
    path = folder / "checkpoint-799.pth"
    momenta = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    tree = {"model": official_state(), "optimizer": momenta, "epoch": 799, "scaler": {"scale": 1.0}}
    torch.save({**tree, "args": Namespace(model="mae_vit_tiny", lr=0.1)}, path)
    return path


def imported(folder: Path, file: Path) -> MaskedAutoencoder:
    import_weights(file, folder / "imported", heads=4, decoder_heads=2)
    mae = build_mae(MODEL, norm_pix=True, mask_ratio=0.75)
    taken = start_mae(mae, open_weights(folder / "imported").state, MODEL)
    assert taken.made == taken.left == ()
    return mae


def test_an_official_file_gives_the_loss_and_pixels_of_an_independent_computation(tmp_path: Path) -> None:
    mae = imported(tmp_path, official_file(tmp_path)).double()
    images, noise = inputs()
    loss, predicted = small_mae.loss_and_patches(official_state(), images, noise)
    assert mae(images.double(), noise).item() == pytest.approx(loss, rel=1e-10)
    pixels, is_masked = mae.reconstruct(images.double(), noise)
    patches = mae._patches(pixels).flatten(3).flatten(1, 2)
    truth = mae._patches(images.double()).flatten(3).flatten(1, 2)
    mean, deviation = truth.mean(2, keepdim=True), (truth.var(2, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(patches[is_masked], (predicted * deviation + mean)[is_masked], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(patches[~is_masked], truth[~is_masked], rtol=0, atol=0)


def test_an_import_has_the_bits_of_the_file_and_says_what_it_left(tmp_path: Path) -> None:
    report = import_weights(official_file(tmp_path), tmp_path / "out", heads=4, decoder_heads=2)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert state.keys() == official_state().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in official_state().items())
    assert report["left"] == ("optimizer", "epoch", "scaler", "args")
    assert report["source"]["layout"] == "mae"
    assert Model.model_validate(report["model"]).dims == (32, 2, 4, 4)


def test_hugging_face_and_back_is_the_same_to_the_bit(tmp_path: Path) -> None:
    save_file({k: v.contiguous() for k, v in to_hf(official_state()).items()}, tmp_path / "hf.safetensors")
    weights = open_weights(tmp_path / "hf.safetensors")
    assert weights.layout == "hf"
    assert weights.state.keys() == official_state().keys()
    assert all(torch.equal(weights.state[name], tensor) for name, tensor in official_state().items())


def hugging_face(state: dict[str, torch.Tensor], folder: Path, *, norm_pix: bool) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=16, patch_size=4,
        decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, layer_norm_eps=1e-6, norm_pix_loss=norm_pix,
    )  # fmt: skip
    folder.mkdir()
    config.architectures = ["ViTMAEForPreTraining"]
    config.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in to_hf(state).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model, told = transformers.ViTMAEForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_hugging_faces_model_gives_the_same_loss_with_the_same_weights_and_noise(
    tmp_path: Path, norm_pix: bool
) -> None:
    theirs = hugging_face(official_state(), tmp_path / "hf", norm_pix=norm_pix)
    weights = open_weights(tmp_path / "hf")
    assert (weights.heads, weights.decoder_heads) == (4, 2)
    ours = build_mae(MODEL, norm_pix=norm_pix, mask_ratio=0.75)
    start_mae(ours, weights.state, MODEL)
    images, noise = inputs()
    with torch.inference_mode():
        assert float(ours(images, noise)) == pytest.approx(float(theirs(images, noise=noise).loss), rel=1e-5)


def test_the_names_that_transformers_has_in_memory_are_read_too(tmp_path: Path) -> None:
    theirs = hugging_face(official_state(), tmp_path / "hf", norm_pix=True)
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "memory.safetensors")
    save_file({k: v.contiguous() for k, v in theirs.vit.state_dict().items()}, tmp_path / "encoder.safetensors")
    state = open_weights(tmp_path / "memory.safetensors").state
    assert all(torch.equal(state[name], tensor) for name, tensor in official_state().items())
    encoder = open_weights(tmp_path / "encoder.safetensors").state
    assert encoder.keys() == {n for n in official_state() if "decoder" not in n and n != "mask_token"}
    assert all(torch.equal(encoder[name], official_state()[name]) for name in encoder)
