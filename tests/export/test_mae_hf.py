"""A run's weights go to MAE's code and to Hugging Face, and come back with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from livt_scale.export.mae_hf import export_as
from livt_scale.models.mae import build_mae
from livt_scale.util.errors import ExportError, UsageError
from livt_scale.weights.importer import open_weights
from tests.tiny_run import tiny_recipe, tiny_run
from tests.weights.test_start import pretrained_run, recipe_from


@pytest.mark.parametrize("layout", ["mae", "hf"])
def test_a_masked_autoencoder_comes_back_with_the_same_bits(tmp_path: Path, layout: str) -> None:
    state = pretrained_run(tmp_path / "run")
    told = export_as(tmp_path / "run", tmp_path / "out", layout=layout, stage="pretrain")
    back = open_weights(tmp_path / "out")
    assert back.state.keys() == state.keys()
    assert all(torch.equal(back.state[name], state[name]) for name in state)
    assert told["lineage"]["position"] == {"epoch": 2, "step": 40}
    if layout == "mae":
        assert torch.load(tmp_path / "out/checkpoint.pth", weights_only=True).keys() == {"model"}
    with pytest.raises(ExportError, match="there already"):
        export_as(tmp_path / "run", tmp_path / "out", layout=layout, stage="pretrain")


def test_hugging_face_reads_the_export_and_gives_the_loss_of_the_run(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    state = pretrained_run(tmp_path / "run")
    export_as(tmp_path / "run", tmp_path / "out", layout="hf", stage="pretrain")
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "out").eval()
    ours = build_mae(recipe_from(None, stage="pretrain").model, norm_pix=True, mask_ratio=0.75)
    ours.load_state_dict(state)
    images, noise = torch.randn(2, 1, 28, 28), torch.rand(2, 49)
    with torch.inference_mode():
        assert ours(images, noise).item() == pytest.approx(theirs(images, noise=noise).loss.item(), rel=1e-5)


def test_a_classifier_goes_out_under_maes_names(tmp_path: Path) -> None:
    live = tiny_run(tmp_path / "run", tiny_recipe(), steps=(40,))[40].state_dict()
    export_as(tmp_path / "run", tmp_path / "out", layout="mae", stage="finetune")
    back = open_weights(tmp_path / "out").state
    assert back.keys() == live.keys()
    assert all(torch.equal(back[name], live[name]) for name in live)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layout": "tim", "stage": "pretrain"}, "did you mean 'timm'"),
        ({"layout": "timm", "stage": "pretrain"}, "no place for a masked autoencoder"),
        ({"layout": "hf", "stage": "finetune"}, "has no classifier"),
        ({"layout": "mae", "stage": "fine"}, "did you mean 'finetune'"),
        ({"layout": "mae", "stage": "pretrain", "which": "best"}, "fine-tuning checkpoints"),
    ],
)
def test_what_cannot_be_written_is_said(tmp_path: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        export_as(tmp_path, tmp_path / "out", **options)  # type: ignore[arg-type]
