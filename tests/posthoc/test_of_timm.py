"""What is done to a trained classifier, of a model of timm: τ-normalisation, cRT, soups, predictions."""

from __future__ import annotations

import pytest
import timm
import torch

from livt_scale.data.loader import eval_batches, normalise
from livt_scale.export.write_export import export_run
from livt_scale.models.classifier import head_of
from livt_scale.posthoc.crt import Settings, retrain_head
from livt_scale.posthoc.features import features
from livt_scale.posthoc.predict import predict
from livt_scale.posthoc.soup import make_soup, read_members
from livt_scale.posthoc.tau_norm import normalised, tau_normalise
from livt_scale.train.open_trained import open_trained
from tests.timm_families import FAMILIES
from tests.tiny_run import tiny_recipe, tiny_run, tiny_shards

pytestmark = pytest.mark.slow
PER_CLASS = {"a": 6, "b": 4, "c": 3}


@pytest.fixture(scope="module", params=["convnext", "siglip"])
def run(request, tmp_path_factory):
    """(folder of a run, its shards)."""
    folder = tmp_path_factory.mktemp(request.param)
    shards = tiny_shards(folder, PER_CLASS)
    recipe = tiny_recipe(train=shards.folder, val=shards.folder, **FAMILIES[request.param])
    names = {"class_names": tuple(PER_CLASS), "class_counts": tuple(PER_CLASS.values())}
    tiny_run(folder / "run", recipe, **names)
    return folder / "run", shards


def test_features_and_head_give_the_logits_of_timm(run, tmp_path):
    folder, shards = run
    export_run(folder, tmp_path / "out")
    trained = open_trained(tmp_path / "out")
    outputs = features(trained, shards)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with eval_batches(shards, trained.recipe, rank=0, world_size=1, batch=16) as batches, torch.inference_mode():
        data = trained.recipe.data
        logits = torch.cat([theirs(normalise(b.images, data.mean, data.std, torch.float32)) for b in batches])
        torch.testing.assert_close(head_of(trained.model)(outputs.values), logits)


def test_tau_norm_and_crt_change_the_head_alone(run, tmp_path):
    folder, shards = run
    before = open_trained(folder).model
    made = tau_normalise(folder, tmp_path / "tau", taus=[1.0], data=str(shards.folder))
    retrain_head(folder, tmp_path / "crt", settings=Settings(epochs=1))
    assert made["tau"] == 1.0
    tau, crt = (open_trained(tmp_path / name).model for name in ("tau", "crt"))
    torch.testing.assert_close(head_of(tau).weight, normalised(head_of(before).weight, 1.0))
    assert not torch.equal(head_of(crt).weight, head_of(before).weight)
    for model in (tau, crt):
        differ = [n for n, t in model.state_dict().items() if not torch.equal(t, before.state_dict()[n])]
        assert all(name.startswith(before.facts.head) for name in differ)


def test_soups_and_predictions(run, tmp_path):
    folder, shards = run
    steps = folder / "finetune" / "checkpoints"
    members = read_members([steps / "step-00000040", steps / "step-00000080"])
    make_soup(members, tmp_path / "soup", data=str(shards.folder))
    first, last = (open_trained(folder, which=step).model for step in ("40", "80"))
    mean = (head_of(first).weight + head_of(last).weight) / 2
    torch.testing.assert_close(head_of(open_trained(tmp_path / "soup").model).weight, mean)
    out = tmp_path / "rows.csv"
    predict(open_trained(folder), shards.folder.parent / "raw" / "a", out)
    assert len(out.read_text().splitlines()) == 1 + PER_CLASS["a"]
