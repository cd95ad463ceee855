"""Pictures: what an eye must see, read back from the PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from livt_scale.evaluation import pictures, plots

MEAN, STD = (0.3, 0.5, 0.2), (0.2, 0.25, 0.3)


def perfect(
    images: torch.Tensor, *, noise: torch.Tensor, mean=MEAN, std=STD, off: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a MAE gives that predicts every patch exactly, but for `off`; the higher half of the noise is masked."""
    shape = (1, -1, 1, 1)
    pixels = (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    ranks = noise.argsort(dim=1).argsort(dim=1)
    return pixels + off, ranks >= noise.shape[1] // 2


def panels(path: Path, *, num: int, side: int) -> np.ndarray:
    """[num, 3, side, side, 3]: the panels of the picture, cut back to one pixel a pixel."""
    picture = np.asarray(Image.open(path))
    factor = -(-pictures.PANEL_PX // side)
    step = side * factor + pictures.GAP_PX
    rows = [
        [
            picture[16 + r * step : 16 + r * step + side * factor, pictures.GAP_PX + c * step :][
                ::factor, : side * factor : factor
            ]
            for c in range(3)
        ]
        for r in range(num)
    ]
    return np.asarray([[cell[:side, :side] for cell in row] for row in rows])


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_perfect_model_draws_the_original_again_with_normalisation_undone(tmp_path: Path, channels: int) -> None:
    images = torch.randint(0, 256, (2, channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "samples of 'a run'" / "step.png"
    mean, std = (MEAN * 2)[:channels], (STD * 2)[:channels]
    made, is_masked = perfect(images, noise=torch.rand(2, 16), mean=mean, std=std)
    pictures.reconstructions(images, made, is_masked, mean=mean, std=std, path=path)
    original, _, made = panels(path, num=2, side=8).transpose(1, 0, 2, 3, 4)
    shown = images[:, :3] if channels >= 3 else images.expand(-1, 3, -1, -1)
    np.testing.assert_array_equal(original, shown.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(made, original)


def test_exactly_the_masked_patches_are_hidden_and_predicted(tmp_path: Path) -> None:
    images = torch.full((1, 3, 8, 8), 200, dtype=torch.uint8)
    noise = torch.arange(16.0)[None]  # patches of 2 px; the upper two rows of four are kept
    far_too_dark, is_masked = perfect(images, noise=noise, off=-100.0)  # where it shows, it was predicted
    path = tmp_path / "step.png"
    pictures.reconstructions(images, far_too_dark, is_masked, mean=MEAN, std=STD, path=path)
    original, hidden, made = panels(path, num=1, side=8)[0]
    assert (original == 200).all()
    assert (hidden[:4] == 200).all()
    assert (hidden[4:] == round(pictures.MASKED_GREY * 255)).all()
    assert (made[:4] == 200).all()
    assert (made[4:] == 0).all()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    noise = torch.rand(3, 49, generator=torch.Generator().manual_seed(2))
    report = {"confusion": [[3, 1], [0, 4]]}
    for name in ("a", "b"):
        made, is_masked = perfect(images, noise=noise, mean=MEAN[:1], std=STD[:1])
        path = tmp_path / f"{name}.png"
        pictures.reconstructions(images, made, is_masked, mean=MEAN[:1], std=STD[:1], path=path)
        plots.confusion(report, ["T-shirt", "Boot"], tmp_path / f"{name}-confusion.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a-confusion.png").read_bytes() == (tmp_path / "b-confusion.png").read_bytes()


@pytest.mark.parametrize("num_classes", [1, 2, 20, 21, 999, 1000, 1001, 2500])
def test_a_confusion_of_any_number_of_classes_fits_a_screen(tmp_path: Path, num_classes: int) -> None:
    report = {"confusion": np.eye(num_classes, dtype=int)}
    path = tmp_path / "confusion.png"
    plots.confusion(report, [f"class {k}" for k in range(num_classes)], path)
    with Image.open(path) as picture:
        assert max(picture.size) <= 1100
        assert np.asarray(picture).min() < 100  # a dark diagonal


def test_class_names_of_any_kind_are_drawn(tmp_path: Path) -> None:
    names = ["", "two\nlines", "$\\frac{", "名前", "x" * 300, "\x00\x07", "a 'b\" c", "\u202eright to left"]
    plots.confusion({"confusion": np.zeros((8, 8), dtype=int)}, names, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert max(picture.size) < 600
