"""`livt predict`: what the CSV says is what the evaluation says; odd names, damaged files, nothing half-written."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from livt_scale.cli.main import app
from livt_scale.data.loader import eval_batches
from livt_scale.evaluation.adjust import adjust
from livt_scale.evaluation.tta import Views
from livt_scale.export.write_export import export_run
from livt_scale.posthoc.predict import Prediction, predict
from livt_scale.posthoc.predict_inputs import images_below
from livt_scale.train.load_trained import Trained
from livt_scale.train.open_trained import open_trained
from livt_scale.util.errors import DataError, SampleError, UsageError
from tests.tiny_run import tiny_recipe, tiny_run, tiny_shards

NAMES = ("T-shirt/top", "two\nlines", 'a "quoted" one', "名前")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    tiny_run(run, tiny_recipe(train="gone"), class_names=NAMES, class_counts=(300, 120, 20, 3))
    export_run(run, tmp_path / "an export")
    return tmp_path / "an export"


@pytest.fixture
def trained(export: Path) -> Trained:
    return open_trained(export)


def picture(path: Path, seed: int, *, px: int = 40, mode: str = "L", kind: str = "png") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (px, px + 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, kind)
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))


def livt(*args: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)


@pytest.mark.parametrize("views", [1, 10])
def test_an_image_of_a_shard_gets_what_the_evaluation_gives_it(trained: Trained, tmp_path: Path, views: int) -> None:
    shards = tiny_shards(tmp_path / "set", {"a": 4, "b": 3}, size_px=37)
    how = Prediction(top_k=4, tau=0.5, temperature=2.0, views=Views(views))  # type: ignore[arg-type]
    summary = predict(trained, tmp_path / "set" / "raw", tmp_path / "out.csv", how=how, batch=3)
    assert (summary["images"], summary["predicted"], summary["bad"]) == (7, 7, 0)
    found = {row["file"]: row for row in rows_of(tmp_path / "out.csv")}
    crops = how.views.crops
    with eval_batches(shards, trained.recipe, rank=0, world_size=1, batch=1, crops=crops) as batches:
        for batch in batches:
            with torch.no_grad():
                logits = how.views.logits(trained.model, batch.images, trained.recipe.data)
            logits = adjust(logits, 0.5, loss="bal_bce", class_counts=trained.classes.counts)
            shares = (logits[0].double() / 2).softmax(0)
            row = found[batch.keys[0].removeprefix("raw-") + ".png"]
            order = shares.argsort(descending=True).tolist()
            assert [int(row[f"number_{k + 1}"]) for k in range(4)] == order
            assert [row[f"class_{k + 1}"] for k in range(4)] == [NAMES[c] for c in order]
            told = [float(row[f"probability_{k + 1}"]) for k in range(4)]
            assert told == pytest.approx(shares[order].tolist(), abs=2e-5)
            assert sum(told) == pytest.approx(1, abs=1e-5)


def test_nested_odd_and_hidden_names_stand_in_the_order_of_their_paths(trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    names = ["b.PNG", 'deep/er/a, "b"\nc.png', "=1+1.jpg", "名前.webp", "x.bmp", "-rf.jpeg"]
    for seed, name in enumerate(names):
        kind = {"jpg": "jpeg", "jpeg": "jpeg", "webp": "webp", "bmp": "bmp"}.get(name.rpartition(".")[2], "png")
        picture(folder / name, seed, mode="RGB", kind=kind)
    raw = os.fsencode(folder) + b"/not-utf8-\xff.png"
    os.link(folder / "b.PNG", raw)
    picture(folder / ".hidden.png", 0)
    picture(folder / ".cache" / "a.png", 0)
    (folder / "notes.txt").write_text("no image")
    (folder / "round").symlink_to(folder)  # must not be walked for ever
    (folder / "link.png").symlink_to(folder / "b.PNG")
    files, others = images_below(folder)
    assert sorted(files) == files == sorted([*names, "link.png", os.fsdecode(b"not-utf8-\xff.png")])
    assert others == 2  # notes.txt and .hidden.png; a link to a folder is neither
    predict(trained, folder, tmp_path / "out.csv", batch=2)
    shown = [os.fsencode(name).decode(errors="backslashreplace").replace("\\xff", "\\udcff") for name in files]
    assert [row["file"] for row in rows_of(tmp_path / "out.csv")] == shown
    same = {row["file"]: row["probability_1"] for row in rows_of(tmp_path / "out.csv")}
    assert same["b.PNG"] == same["link.png"] == same["not-utf8-\\udcff.png"]


def damaged(folder: Path) -> None:
    picture(folder / "good.png", 1)
    whole = picture(folder / "cut.jpg", 2, mode="RGB", kind="jpeg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not an image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "film.gif").write_bytes(b"GIF89a")
    (folder / "nowhere.png").symlink_to(folder / "gone")
    os.mkfifo(folder / "pipe.png")  # reading it would never end


def test_damaged_images_are_rows_with_their_error_where_that_is_asked_for(trained: Trained, tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "new folder" / "out.csv"
    damaged(folder)
    summary = predict(trained, folder, out, skip_bad=True, batch=2)
    rows = {row["file"]: row for row in rows_of(out)}
    assert (summary["images"], summary["predicted"], summary["bad"]) == (7, 1, 6)
    assert len(rows) == 7
    assert rows["good.png"]["error"] == ""
    assert rows["good.png"]["class_1"] in NAMES
    for name, row in rows.items():
        if name != "good.png":
            assert row["error"]
            assert row["class_1"] in (None, "")
    assert "cut or damaged" in rows["cut.jpg"]["error"]
    assert "0x" not in rows["text.jpg"]["error"]  # no address: the same file each time
    assert [b["file"] for b in summary["bad_files"]] == sorted(n for n in rows if n != "good.png")
    again = tmp_path / "again.csv"
    predict(trained, folder, again, skip_bad=True, batch=64)
    assert again.read_bytes() == out.read_bytes()


def test_else_the_first_one_ends_it_and_an_older_csv_stays(trained: Trained, tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out" / "out.csv"
    damaged(folder)
    out.parent.mkdir()
    out.write_text("older")
    with pytest.raises(SampleError, match=r"cut\.jpg: the JPEG is cut or damaged.*--skip-bad"):
        predict(trained, folder, out)
    assert out.read_text() == "older"
    assert list(out.parent.iterdir()) == [out]


def test_a_single_image_is_a_csv_of_one_row(export: Path, trained: Trained, tmp_path: Path) -> None:
    photo = picture(tmp_path / "photos" / "a photo", 1)  # whatever its name
    picture(tmp_path / "photos" / "b.png", 2)
    livt("predict", export, photo, "--out", tmp_path / "one.csv")
    photo.rename(tmp_path / "photos" / "a.png")
    predict(trained, tmp_path / "photos", tmp_path / "all.csv")
    [row] = rows_of(tmp_path / "one.csv")
    assert row == rows_of(tmp_path / "all.csv")[0] | {"file": "a photo"}


def test_inputs_are_checked_before_torch_is_loaded(export: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out.csv"
    picture(photos / "a.png", 1)
    (tmp_path / "empty").mkdir()
    out.write_text("mine")
    for arguments in ((tmp_path / "none", photos), (export, tmp_path / "none"), (export, tmp_path / "empty")):
        typed = ["predict", *map(str, arguments), "--out", str(tmp_path / "new.csv")]
        program = (
            "import sys; from livt_scale.cli.main import app\n"
            f"try: app({typed!r}, standalone_mode=False)\n"
            "except BaseException as error: print(type(error).__name__, 'torch' in sys.modules)"
        )
        said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        assert said.split() in (["UsageError", "False"], ["DataError", "False"])
    with pytest.raises(UsageError, match="did not write it"):
        livt("predict", export, photos, "--out", out)


def test_loader_processes_give_the_same_file(trained: Trained, tmp_path: Path) -> None:
    for seed in range(9):
        picture(tmp_path / "photos" / f"{seed}.png", seed)
    (tmp_path / "photos" / "3b.png").write_text("bad")
    for workers in (0, 2):
        predict(trained, tmp_path / "photos", tmp_path / f"{workers}.csv", skip_bad=True, batch=4, workers=workers)
    assert (tmp_path / "0.csv").read_bytes() == (tmp_path / "2.csv").read_bytes()


def test_as_typed_from_an_export_without_its_run(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").rename(tmp_path / "gone")
    for seed in range(3):
        picture(tmp_path / "photos" / f"{seed}.png", seed)
    out = tmp_path / "out.csv"
    summary = json.loads(livt("predict", export, tmp_path / "photos", "--out", out, "--top-k", "9", "--json").stdout)
    assert (summary["predicted"], summary["bad_files"]) == (3, [])
    assert sum(summary["classes"].values()) == 3
    assert summary["weights"]["checkpoint"] == "step-00000080"
    assert len(rows_of(out)[0]) == 2 + 3 * len(NAMES)  # no more classes than there are
    (tmp_path / "photos" / "bad\n.png").write_text("x")
    said = livt("predict", export, tmp_path / "photos", "--out", out, "--skip-bad")
    assert "3 of 4 images" in said.stdout
    assert "bad: 'bad\\n.png': not an image" in said.stderr
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        livt("predict", export, tmp_path / "photos", "--out", out)


def test_what_cannot_be_is_said(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: No such file"):
        predict(trained, tmp_path / "none", tmp_path / "out.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there is no image below"):
        predict(trained, tmp_path / "empty", tmp_path / "out.csv")
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=r"^temperature is"):
            predict(trained, tmp_path, tmp_path / "out.csv", how=Prediction(temperature=value))
    assert not (tmp_path / "out.csv").exists()
