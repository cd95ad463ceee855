"""`livt.init`: from a folder of images to shards and a recipe; `livt init` is a client of it.

    recipe = init("photos/", out="project/")       # project/shards.yaml, project/recipe.yaml, project/project-shards/
    train(recipe)

Everything is decided before anything is written: a folder that cannot be used leaves no project behind. A project that
is interrupted while its shards are written is resumed by the same call.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from livt_scale.config.yaml import parse, validated
from livt_scale.data.build.builder import BuildOptions, PlannedBuild, plan_build
from livt_scale.data.build.sources import Source
from livt_scale.data.build.spec import Spec, build_spec_model
from livt_scale.extensions import load_extensions
from livt_scale.project.files import as_yaml, recipe_text, spec_text, spec_values
from livt_scale.project.measure import PixelFacts, measure
from livt_scale.project.raw_images import RawImages, check_classes, find_images, names_for_both, notes
from livt_scale.project.values import DataFacts, Start, Value, held_out_fraction, recipe_values
from livt_scale.util.atomic import plain_disk_errors, write_atomic
from livt_scale.util.errors import UsageError
from livt_scale.util.outside import read_checked
from livt_scale.util.text import escaped

if TYPE_CHECKING:
    from livt_scale.data.build.scan import Progress

SPEC, RECIPE = "shards.yaml", "recipe.yaml"
MAX_NAME = 50
FEW_IMAGES = 2_000  # up to which starting other processes takes longer than the work


def init(
    folder: str | Path,
    *,
    out: str | Path,
    weights: str | Path | None = None,
    skip_bad: bool = False,
    workers: int | None = None,
    report: Callable[[str], None] = lambda _: None,
    progress: Progress | None = None,
) -> Path:
    """Write the shards of the images in `folder`, and a recipe whose values follow from them. Returns its path.

    folder: `FOLDER/CLASS/**/image`; or train/ and val/ of that form; or a list, lines "path label". out: the folder
    of the project, which must be new. weights: start from them, not from scratch: a file, an import, an export or a
    run. skip_bad: leave out images that cannot be used; else they are an error. workers: processes; None: one per core.
    report: takes each line of what was found and decided. progress: called as the images are read and written.

    Raises UsageError (no such folder; `out` is there), SourceError (images that cannot be used, one class, a class
    without images), WeightsError and DataError (a full disk), all but the last before anything is written.
    """
    project = Path(out)
    _refuse_other(project)
    images = find_images(Path(folder))
    start = _start_from(Path(weights)) if weights is not None else None
    draft = _draft(images, project)
    _refuse_other(project, spec=draft.text)
    for line in notes(draft.train, images):
        report(f"note: {line}")
    workers = workers or (1 if sum(map(len, draft.sources.values())) <= FEW_IMAGES else None)
    planned = plan_build(
        draft.spec,
        project / draft.spec.build.name,
        options=BuildOptions(skip_bad=skip_bad, report=report),
        workers=workers,
        progress=progress,
        opened=draft.sources,
    )
    recipe = _recipe(images, project, draft, planned, start)
    with plain_disk_errors(project):
        project.mkdir(parents=True, exist_ok=True)
        write_atomic(project / SPEC, draft.text.encode())
    planned.write(workers=workers, progress=progress)
    with plain_disk_errors(project):
        write_atomic(project / RECIPE, recipe.encode())
    return project / RECIPE


def _refuse_other(project: Path, *, spec: str | None = None) -> None:
    """Raise UsageError where `project` exists, unless it is an unfinished project, of the text `spec` where given."""
    is_unfinished = (project / SPEC).is_file() and not (project / RECIPE).exists()
    if is_unfinished and spec is not None:
        is_unfinished = read_checked(project / SPEC, "shard spec") == spec.encode()
    if (project.exists() or project.is_symlink()) and not is_unfinished:
        raise UsageError(f"{escaped(project)} exists already", remedy="choose another folder as --out, or remove it")


@dataclass(frozen=True)
class _Draft:
    """The spec, and what was needed to write it."""

    text: str
    spec: Spec
    sources: dict[str, Source]
    pixels: PixelFacts

    @property
    def train(self) -> Source:
        return self.sources[self.spec.build.sets["train"].source]


def _draft(images: RawImages, project: Path) -> _Draft:
    """Open the sources, look at a sample of the training images, and write the spec for them."""
    name = project_name(project)
    values = partial(spec_values, images, f"{name}-shards")
    spec = _spec_of(values(fraction=held_out_fraction(0), shorter_px=0), project)
    sources = {source: spec.open_source(source) for source in spec.build.sources}
    train, *others = (sources[part.source] for part in spec.build.sets.values())
    check_classes(train, images.location)
    names = names_for_both(train, others[0]) if images.evaluation else None
    values = partial(values, fraction=held_out_fraction(len(train)), class_names=names)
    spec = _spec_of(values(shorter_px=0), project)
    if names is not None:
        sources = {source: spec.open_source(source) for source in spec.build.sources}
    pixels = measure(train, spec.part_for("train", train))
    final = values(shorter_px=pixels.shorter_px)
    text = spec_text(final, images=images, path=_as_argument(project / SPEC))
    return _Draft(text, _spec_of(final, project), sources, pixels)


def _spec_of(values: Mapping[str, Value], project: Path) -> Spec:
    load_extensions()
    path = project / SPEC
    return Spec(build=validated(parse(as_yaml(values), path), path, build_spec_model()), folder=project)


def _recipe(images: RawImages, project: Path, draft: _Draft, planned: PlannedBuild, start: Start | None) -> str:
    counts = planned.class_counts()
    sets = draft.spec.build.name
    facts = DataFacts(f"{sets}/train", f"{sets}/val", counts["train"], draft.pixels, start)
    return recipe_text(
        recipe_values(facts),
        name=project_name(project),
        images=images,
        counts=counts["train"],
        num_val=int(counts["val"].sum()),
        path=_as_argument(project / RECIPE),
    )


def project_name(project: Path) -> str:
    """The name of the folder, as the names of runs and sets may be."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", project.absolute().name).strip("-_")
    return plain[:MAX_NAME] or "project"


def train_command(recipe: Path) -> str:
    """What trains `recipe`, for a shell."""
    return f"livt train {_as_argument(recipe)}"


def _as_argument(path: Path) -> str:
    return shlex.quote(escaped(path))


def _start_from(weights: Path) -> Start:
    from livt_scale.project.weights_start import start_from

    return start_from(weights)
