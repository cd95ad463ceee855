"""The report of a study: what it says, that text of others stays text, and the page opened in a real browser."""

import base64
import io
import re
from copy import deepcopy

import pytest
import torch
from PIL import Image

from livt_scale.evaluation.pictures import reconstructions as save_reconstructions
from livt_scale.study.report.html import write_report
from livt_scale.study.report.sections import facts_of, fit_table, sections_of
from livt_scale.study.report.series import curve_panels, scaling_panels
from livt_scale.study.report.thumbnails import reconstructions
from livt_scale.util.errors import DataError
from tests.study.synthetic import fail, study

HOSTILE = "<script>alert(1)</script>|$$x$$\"'"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A small study with a hostile name, a failed run, and pictures; its report."""
    folder = tmp_path_factory.mktemp("report")
    collected = study(sizes=("nano", "micro", "mini"), epochs=(3, 6), pictures=folder)
    collected["name"] = HOSTILE
    fail(collected["runs"][1], why="NonFiniteError: <b>NaN</b> at step 812")
    for run in collected["runs"][2:3]:
        run["name"] = run["folder"] = HOSTILE
    write_report(collected, folder)
    return folder


def test_text_of_others_stays_text(hostile):
    page = (hostile / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<b>NaN" not in page
    assert len(re.findall(r"<script\b", page.split("<main", 1)[0])) == 0
    assert "<script" not in (hostile / "report.md").read_text().replace("\\<script", "")


def test_a_failed_run_is_named_with_why_and_a_fit_without_law_says_so(hostile):
    for file in ("report.html", "report.md"):
        said = (hostile / file).read_text()
        assert "NonFiniteError" in said
        assert "No law" in said
        assert "4 points for 3 constants are too few" in said


def test_the_pictures_for_papers_are_there(hostile):
    for section in ("scaling", "shots", "curves", "cost"):
        assert (hostile / f"report-{section}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(report-{section}.png)" in (hostile / "report.md").read_text()


def three_columns(path, *, seed, made):
    """A picture as pretraining saves it: original, masked, reconstruction."""
    images = torch.randint(0, 256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    masked = torch.ones(2, 4, dtype=torch.bool)
    save_reconstructions(images, torch.full((2, 1, 8, 8), made), masked, mean=[0.0], std=[1.0], path=path)
    return str(path)


def test_images_that_all_runs_were_shown_are_there_once(tmp_path):
    collected = study(sizes=("nano", "micro"), epochs=(3,), seeds=(0,))
    for number, run in enumerate(collected["runs"]):
        run["picture"] = three_columns(tmp_path / f"{number}.png", seed=0, made=number / 2)
    grid = reconstructions(collected)
    with Image.open(collected["runs"][0]["picture"]) as whole:
        full, column = whole.size, whole.width - 2 * ((whole.width - 4) // 3) - 4
    shown = [decoded(cell.uri) for _, cells in grid.rows for cell in cells]
    assert [image.size for image in shown] == [(column, full[1])] * 2  # of three
    assert decoded(grid.originals.uri).width == full[0] - column
    assert shown[0].getpixel((50, 60)) != shown[1].getpixel((50, 60))

    collected["runs"][1]["picture"] = three_columns(tmp_path / "other.png", seed=1, made=0.5)
    grid = reconstructions(collected)
    assert grid.originals is None
    assert [decoded(cell.uri).size for _, cells in grid.rows for cell in cells] == [full] * 2


def test_a_picture_that_cannot_be_read_leaves_the_others_and_the_images_of_all(tmp_path):
    collected = study(sizes=("nano", "micro", "mini"), epochs=(3,), seeds=(0,))
    for number, run in enumerate(collected["runs"]):
        run["picture"] = three_columns(tmp_path / f"{number}.png", seed=0, made=number / 2)
    (tmp_path / "0.png").write_bytes(b"cut")
    grid = reconstructions(collected)
    assert [cell.why for _, cells in grid.rows for cell in cells] == ["its picture cannot be read", "", ""]
    assert decoded(grid.originals.uri).width


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_law_that_the_runs_do_not_determine_has_no_line_and_no_table(tmp_path):
    collected = study(sizes=("nano", "micro", "mini"), epochs=(3,), seeds=(0,))
    determined, undetermined = deepcopy(collected), deepcopy(collected)
    undetermined["fits"][0]["problem"] = "E is at the lower end: these runs do not determine it"
    assert [panel.band is not None for panel in scaling_panels(determined)] == [True, False]
    assert [panel.band is not None for panel in scaling_panels(undetermined)] == [False, False]
    assert fit_table(undetermined["fits"][0])["problem"] == undetermined["fits"][0]["problem"]
    text = {section.id: section.text for section in sections_of(undetermined)}["scaling"]
    assert text == "Each point is a run."
    assert "Hollow points" in {section.id: section.text for section in sections_of(determined)}["scaling"]
    assert not [fact for fact in facts_of(undetermined) if "held-out" in fact.what]


def test_evaluations_are_curves_and_a_single_one_is_none():
    collected = study(sizes=("nano",), epochs=(3,), seeds=(0, 1))
    assert [p.key for p in curve_panels(collected)] == ["pretrain-0", "finetune-0", "evaluations-0"]
    for run in collected["runs"]:
        run["curves"]["evaluations"] = run["curves"]["evaluations"][-1:]
    assert [p.key for p in curve_panels(collected)] == ["pretrain-0", "finetune-0"]


def test_what_is_no_collected_study_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a collected study"):
        write_report({"format": "other"}, tmp_path)
    with pytest.raises(DataError, match="version 9"):
        write_report({"format": "livt-study", "version": 9}, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_hundred_runs_with_pictures_stay_under_five_megabytes(tmp_path):
    collected = study(sizes=("nano", "micro", "mini", "small", "base"), epochs=(1, 2, 3, 6, 12), seeds=(0, 1, 2, 3),
                      pictures=tmp_path)  # fmt: skip
    assert len(collected["runs"]) == 100
    page, *_ = write_report(collected, tmp_path)
    assert page.stat().st_size < 5_000_000


@pytest.mark.slow
def test_the_page_in_a_browser(hostile, browser):
    page = browser.new_page(viewport={"width": 1600, "height": 900}, color_scheme="light")
    page.set_default_timeout(120_000)
    problems, requests = [], []
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: requests.append(r.url) if not r.url.startswith("data:") else None)
    page.goto((hostile / "report.html").as_uri(), wait_until="commit")
    page.wait_for_selector("html[data-drawn]", state="attached")  # no wait_for_function: the page forbids eval
    expected = page.locator(".plot").count()
    assert expected >= 10
    assert page.evaluate("Number(document.documentElement.dataset.drawn)") == expected
    filled = """() => [...document.querySelectorAll(".plot")].filter((plot) => {
      const inside = (n) => [...n.querySelectorAll("*")].flatMap((e) => [e, ...(e.shadowRoot ? inside(e.shadowRoot) : [])]);
      return inside(plot).some((e) => e.tagName === "CANVAS" && e.width > 100 &&
        e.getContext("2d").getImageData(0, 0, e.width, e.height).data.some((v) => v > 0));
    }).length"""  # noqa: E501
    assert page.evaluate(filled) == expected
    for width in (400, 1600):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert_sorts(page)
    ink = "getComputedStyle(document.body).color"
    label = "Bokeh.documents[0].roots()[0].below[0].major_label_text_color"
    light = page.evaluate(ink), page.evaluate(label)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(300)
    dark = page.evaluate(ink), page.evaluate(label)
    assert light[0] != dark[0]
    assert light[1] != dark[1]  # the plots follow
    assert problems == []
    assert requests == [(hostile / "report.html").as_uri()]


def assert_sorts(page):
    """By a click and by the keyboard, and back; runs without a value come last both times."""
    head = page.locator("#runs th:has(button:text-is('all %'))")
    column = page.evaluate("h => [...h.parentElement.children].indexOf(h)", head.element_handle())
    values = f"[...document.querySelectorAll('#runs tbody tr')].map(r => r.children[{column}].dataset.value)"
    head.locator("button").click()
    up = page.evaluate(values)
    assert head.get_attribute("aria-sort") == "ascending"
    assert up[-1] == ""
    assert [float(v) for v in up[:-1]] == sorted(float(v) for v in up[:-1])
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert page.evaluate(values) == [*up[-2::-1], ""]
