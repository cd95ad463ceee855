"""`livt init` and `livt report` on the command line: what they print, and the files that they do not replace."""

from typer.testing import CliRunner

from livt_scale.cli.main import app
from livt_scale.util.errors import UsageError
from tests.small_sets import write_image_folder
from tests.tiny_run import tiny_recipe, tiny_run


def livt(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def test_init_prints_what_it_found_and_the_command_that_trains(tmp_path):
    write_image_folder(tmp_path / "photos", {"cat": 9, "owl": 1})
    done = livt("init", tmp_path / "photos", "--out", tmp_path / "pro ject")
    assert done.exit_code == 0
    assert "10 images, 0 that cannot be used" in done.stdout
    assert "note: 1 class has one image (owl)" in done.stdout
    assert done.stdout.rstrip().endswith(f"livt train '{tmp_path}/pro ject/recipe.yaml'")
    assert (tmp_path / "pro ject" / "pro-ject-shards" / "val" / "manifest.json").is_file()


def test_report_replaces_its_own_page_and_no_other_file(tmp_path):
    tiny_run(tmp_path / "run", tiny_recipe(), steps=(40,))
    for _ in range(2):
        assert livt("report", tmp_path / "run").stdout.strip() == str(tmp_path / "run" / "report.html")
    (tmp_path / "thesis.html").write_text("<p>mine</p>")
    refused = livt("report", tmp_path / "run", "--out", tmp_path / "thesis.html")
    assert isinstance(refused.exception, UsageError)
    assert (tmp_path / "thesis.html").read_text() == "<p>mine</p>"
    assert livt("report", tmp_path / "run", "--out", tmp_path / "thesis.html", "--force").exit_code == 0
