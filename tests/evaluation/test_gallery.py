"""The gallery: the worst pairs, nothing from outside, hostile names harmless, small enough, readable without eyes."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from livt_scale.data.shard_set import ShardSet
from livt_scale.evaluation import gallery
from livt_scale.evaluation.holdout import halves
from livt_scale.evaluation.logits import About, Outputs
from livt_scale.util.errors import DataError
from livt_scale.util.text import visible
from tests.evaluation.made import NAMES, outputs
from tests.tiny_run import tiny_shards

HOSTILE = (
    '"><script>alert(1)</script>',
    "' onerror='alert(1)",
    "{{ 7 * 7 }}{% for x in y %}",
    "\u202egnp.exe\x1b[31m\nnew line",
    "</section></main><a href=https://evil.example>here</a>",
    "",
)
VOID = ("meta", "br", "img")


class Page(HTMLParser):
    """Every element with its attributes; that each that is opened is closed; the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def uri(row: int) -> str:
    return gallery.data_uri(np.full((28, 28, 3), row % 256, dtype=np.uint8))


def test_the_worst_pairs_are_those_of_a_plain_loop() -> None:
    made = outputs(300, seed=2)
    z, labels = made.logits.double(), made.labels.tolist()
    given, sure = z.argmax(1).tolist(), z.softmax(1).amax(1).tolist()
    pairs: dict[tuple[int, int], list[int]] = {}
    for i, (true, found) in enumerate(zip(labels, given, strict=True)):
        if true != found:
            pairs.setdefault((true, found), []).append(i)
    found = gallery.worst(made, pairs=7, per_pair=3)
    shares = {pair: len(rows) / labels.count(pair[0]) for pair, rows in pairs.items()}
    assert [c.share for c in found] == sorted(shares.values(), reverse=True)[:7]
    for c in found:
        rows = sorted(pairs[c.true, c.predicted], key=lambda i: -sure[i])
        assert c.count == len(rows)
        assert c.share == shares[c.true, c.predicted]
        assert list(c.rows) == rows[:3]
        assert c.confidence == pytest.approx([sure[i] for i in rows[:3]])


def test_a_model_without_a_mistake_has_a_page_that_says_so() -> None:
    made = outputs(20)
    right = made.with_logits(torch.nn.functional.one_hot(made.labels, 5).float())
    assert gallery.worst(right) == []
    assert "No image is given to a wrong class." in gallery.page(right, [], uri)


@pytest.mark.parametrize("names", [HOSTILE, tuple("abcdef")])
def test_names_from_strangers_are_text_and_nothing_else(names: tuple[str, ...]) -> None:
    made = outputs(300, counts=(9, 8, 7, 6, 5, 4), data={"folder": names[0], "manifest_digest": "", "num_samples": 1})
    about = About(**{**made.about.__dict__, "class_names": names})
    keys = tuple(f"{names[i % 5]}{i}" for i in range(300))
    page = Page(gallery.page(Outputs(made.logits, made.labels, keys, about), gallery.worst(made), uri))
    kinds = {tag for tag, _ in page.elements}
    assert not kinds & {"script", "iframe", "object", "embed", "link", "base", "form", "svg", "math"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all((a["href"] or "").startswith("#") for a in page.all("a"))
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.all("img"))
    text = "".join(page.text)
    assert "\u202e" not in text
    assert "\x1b" not in text
    if names is HOSTILE:
        assert "\\u{202e}gnp.exe\\u{1b}[31m\\u{a}new line" in text
        assert "{{ 7 * 7 }}" in text
        assert '"><script>alert(1)</script>' in text  # as text


def test_it_asks_nothing_of_the_network() -> None:
    made = outputs(200)
    text = gallery.page(made, gallery.worst(made), uri)
    policy = next(a for a in Page(text).all("meta") if a.get("http-equiv"))
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_it_can_be_read_without_eyes_and_at_night() -> None:
    made = outputs(200)
    text = gallery.page(made, gallery.worst(made), uri)
    page = Page(text)
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    for image in page.all("img"):
        assert re.fullmatch(r"Image img-\d+: of class (.|\n)+, taken for (.|\n)+", image["alt"] or "")
    targets = {attributes["id"] for _, attributes in page.elements if attributes.get("id")}
    assert {(a["href"] or "")[1:] for a in page.all("a")} <= targets
    assert {s["aria-labelledby"] for s in page.all("section")} <= targets
    assert all(th.get("scope") in ("col", "row") for th in page.all("th"))
    assert page.all("caption")
    assert "prefers-color-scheme: dark" in text
    for scheme in re.findall(r":root \{([^}]*)\}", text):  # contrast of text on the page and on cards, WCAG AA
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        assert all(
            contrast(colours[ink], colours[ground]) >= 4.5
            for ink in ("ink", "soft", "link")
            for ground in ("paper", "card")
        )


def contrast(one: str, other: str) -> float:
    lights = []
    for colour in (one, other):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


# --- with images ---


def made_of(shards: ShardSet) -> Outputs:
    """Everything of class 0 taken for class 1, the others right."""
    positions = np.arange(shards.num_samples)
    labels = torch.from_numpy(shards.labels(shards.usable_to_sample(positions)))
    logits = torch.nn.functional.one_hot(labels.clamp(min=1), shards.num_classes).float() * 3
    logits += torch.arange(len(labels))[:, None] * torch.tensor([0.0, 0.01, 0.0])
    data = {"folder": str(shards.folder), "manifest_digest": shards.digest, "num_samples": len(labels)}
    facts = {"data": data, "weights": {}, "precision": "fp32", "views": {}}
    names = tuple(shards.manifest.class_names)
    return Outputs(logits, labels, tuple(shards.keys(positions)), About(names, (300, 50, 5), 100, 20, "ce", 1.0, facts))


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return tiny_shards(tmp_path / "set", {"a": 9, "b": 3, "c": 2})


def decoded(source: str) -> np.ndarray:
    kind, _, data = source.partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image.convert("RGB"))


def test_the_images_of_the_page_are_those_of_the_set_also_of_a_half(shards: ShardSet, tmp_path: Path) -> None:
    whole = made_of(shards)
    for part in (whole, halves(whole)[1]):
        path = tmp_path / "gallery of 'a run'.html"
        count = gallery.write_gallery(part, shards, path)
        images = Page(path.read_text(encoding="utf-8")).all("img")
        assert len(images) == count == min(6, int((part.labels == 0).sum()))
        for image in images:
            key = (image["alt"] or "").removeprefix("Image ").partition(":")[0]
            name = key.removeprefix("raw-")
            with Image.open(tmp_path / "set" / "raw" / f"{name}.png") as original:
                np.testing.assert_array_equal(decoded(image["src"] or ""), np.asarray(original.convert("RGB")))


def test_the_page_in_a_browser(shards: ShardSet, tmp_path: Path, browser: Any) -> None:
    made = made_of(shards)
    made = dataclasses.replace(
        made, about=dataclasses.replace(made.about, class_names=(HOSTILE[0], "sweatshirts", HOSTILE[2]))
    )
    path = tmp_path / "gallery of 'a run'.html"
    count = gallery.write_gallery(made, shards, path)
    page = browser.new_page(viewport={"width": 1600, "height": 900}, color_scheme="light")
    page.set_default_timeout(120_000)
    problems: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda r: requests.append(r.url) if not r.url.startswith("data:") else None)
    page.goto(path.as_uri(), wait_until="load")
    measure = "i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]"
    sizes = page.evaluate(f"[...document.images].map({measure})")
    assert len(sizes) == count > 0
    assert all(complete and natural > 0 and shown > 0 for complete, natural, shown in sizes)
    assert HOSTILE[0] in page.inner_text("main")  # as text
    for width in (400, 1600):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        name = page.locator("td bdi", has_text="sweatshirts").first
        assert name.evaluate("e => e.getClientRects().length") == 1, "a word is broken"
    page.click("a[href='#pair-1']")
    assert page.url.endswith("#pair-1")
    assert 0 <= page.evaluate("document.getElementById('pair-1').getBoundingClientRect().top") < 900
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    assert problems == []
    assert {url.partition("#")[0] for url in requests} == {path.as_uri()}


def test_large_images_are_made_small_and_the_file_has_a_limit(shards: ShardSet, tmp_path: Path) -> None:
    big = np.random.default_rng(0).integers(0, 256, (400, 900, 3), dtype=np.uint8)
    assert decoded(gallery.data_uri(big)).shape == (71, 160, 3)
    made, path = made_of(shards), tmp_path / "g.html"
    everything = gallery.write_gallery(made, shards, path)
    one = len(gallery.data_uri(np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)))
    fewer = gallery.write_gallery(made, shards, path, most_bytes=200_000 + 2 * one)
    assert 0 < fewer < everything
    assert f"{everything - fewer} more are left out" in path.read_text()
    # 120 noise images of the largest size, the worst there is
    assert 120 * len(gallery.data_uri(np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8))) < 5e6


def test_another_set_than_the_one_evaluated_is_refused(shards: ShardSet, tmp_path: Path) -> None:
    other = tiny_shards(tmp_path / "other", {"a": 2, "b": 3, "c": 2})
    with pytest.raises(DataError, match="is not the set that was evaluated"):
        gallery.write_gallery(made_of(shards), other, tmp_path / "g.html")
    assert not (tmp_path / "g.html").exists()


def test_names_that_cannot_be_seen_are_shown_as_numbers() -> None:
    assert visible(NAMES[1]) == 'two\\u{a}lines "quoted", with comma'
    assert visible("名前 ñ 👍") == "名前 ñ 👍"
    assert visible("") == "''"
    assert visible("a\u2028b\ud800") == "a\\u{2028}b\\u{d800}"
