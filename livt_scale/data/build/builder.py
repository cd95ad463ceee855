"""Builds shard sets from raw images according to a spec.

    raw images -> scan -> choice by the profile -> one shuffle by seed -> even cuts -> shards -> index -> manifest

Every image is looked at before anything is written, and what cannot be used is reported in one table. The shuffle
happens once, when written, so that no block of a shard is of one class. Shards are written in parallel; their bytes do
not depend on who writes them. A build that is killed is resumed by the same command: finished shards stay, and the
result has the bytes of an uninterrupted build. Until the manifest exists, `build.json` says which build the folder
belongs to. A finished set is compared with its images: if they are unchanged it is kept; if they have changed it is an
error unless the build runs with `again`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from livt_scale.data.build.record import RECORD, SourceRecord, changes
from livt_scale.data.build.scan import SHOWN, Progress, Scan, by_reason, first_names, scan, table
from livt_scale.data.build.set_plan import (
    SetImages,
    SetPlan,
    check_same_classes,
    plan_set,
    spec_sha256,
    with_equal_images,
)
from livt_scale.data.build.sources import Source
from livt_scale.data.build.spec import Spec
from livt_scale.data.build.writer import Shard, ShardJob, make_shard, publish
from livt_scale.data.manifest import INDEX, KEYS, MANIFEST, QUARANTINE, ShardManifest
from livt_scale.data.shard_set import ShardSet
from livt_scale.extensions import load_extensions
from livt_scale.longtail import Counts
from livt_scale.util.atomic import PREFIX, FileLock, LockHeld, file_lock, plain_disk_errors, write_atomic
from livt_scale.util.errors import DataError, SourceError, UsageError
from livt_scale.util.outside import read_json, real_path
from livt_scale.util.process_pool import in_processes, usable_cores

BUILD = "build.json"
LOCK = ".build.lock"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Built:
    """What `build` did for one set."""

    name: str
    folder: Path
    num_samples: int
    num_bytes: int
    made: int  # shards written now
    kept: int  # shards that were there


@dataclass(frozen=True)
class BuildOptions:
    """How `build` goes about it; none of them changes what a set of good images holds."""

    skip_bad: bool = False  # leave out what cannot be used, and record it; else it is an error
    again: bool = False  # build a finished set again whose images have changed; else it is an error
    decode: bool = True  # check each image down to its last pixel before anything is written; else its header
    report: Report = lambda _: None  # takes each line of what was found


DEFAULTS = BuildOptions()


def build(
    spec: Spec,
    out: str | Path,
    *,
    options: BuildOptions = DEFAULTS,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Built]:
    """Build every set of `spec`, each into its folder below `out`. Sets that are finished are left as they are.

    Raises SourceError (raw images), DataError (a folder of something else, images that changed, a full disk) and
    UsageError (`out` within a source). Shards that are finished are kept whatever happens; a manifest is only there
    if all is.
    """
    planned = plan_build(spec, out, options=options, workers=workers, progress=progress)
    return planned.write(workers=workers, progress=progress)


def plan_build(
    spec: Spec,
    out: str | Path,
    *,
    options: BuildOptions = DEFAULTS,
    workers: int | None = None,
    progress: Progress | None = None,
    opened: Mapping[str, Source] | None = None,
) -> PlannedBuild:
    """Look at every image and decide what goes where; write nothing. Raises as `build`.

    opened: sources of the spec that are open already, by name.
    """
    out = Path(out)
    _check_outside(spec, out)
    sources = dict(opened or {})
    states = {name: _state(spec, name, out / name, sources, options) for name in spec.build.sets}
    _refuse_changed(states, options)
    todo = [name for name, state in states.items() if state.built is None]
    plans: list[SetPlan] = []
    if todo:
        workers = workers or usable_cores()
        scans = {
            source: scan(_opened(spec, source, sources), decode=options.decode, workers=workers, progress=progress)
            for source in dict.fromkeys(spec.build.sets[name].source for name in todo)
        }
        _report_scans(list(scans.values()), options)
        plans = _plans(spec, todo, scans, states, options.report)
    return PlannedBuild(out, plans, states, options)


@dataclass(frozen=True)
class PlannedBuild:
    """A build of which nothing is written yet."""

    out: Path
    plans: list[SetPlan]  # of the sets that are not finished
    states: dict[str, SetState]  # of every set
    options: BuildOptions

    def class_counts(self) -> dict[str, Counts]:
        """[C] Images of each class, by set."""
        finished = {name: ShardManifest.read(state.built.folder) for name, state in self.states.items() if state.built}
        counts = {name: np.array(manifest.class_counts, dtype=np.int64) for name, manifest in finished.items()}
        return counts | {plan.name: plan.class_counts for plan in self.plans}

    def write(self, *, workers: int | None = None, progress: Progress | None = None) -> list[Built]:
        """Write what is missing. Raises as `build`."""
        built = {name: state.built for name, state in self.states.items()}
        if self.plans:
            with plain_disk_errors(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
            with _alone(self.out):
                for plan in self.plans:
                    again = self.states[plan.name].is_changed
                    _claim(plan, self.out / plan.name, again=again, report=self.options.report)
                for plan in self.plans:
                    folder = self.out / plan.name
                    built[plan.name] = _build_set(plan, folder, workers=workers or usable_cores(), progress=progress)
        return [one for one in built.values() if one]


# --- what is there ---


@dataclass(frozen=True)
class SetState:
    """One set before the build."""

    built: Built | None = None  # None: there is work to do
    record: SourceRecord | None = None  # of a finished set
    problem: str = ""  # the images are no longer those that it was built from
    is_changed: bool = False  # what is there is not part of the new set


def _state(spec: Spec, name: str, folder: Path, sources: dict[str, Source], options: BuildOptions) -> SetState:
    """Raises DataError if the set in `folder` is of another spec, SourceError if its images cannot be listed."""
    if not (folder / MANIFEST).exists():
        return SetState()
    manifest = ShardManifest.read(folder)
    if manifest.source.get("spec_sha256") != spec_sha256(spec, name):
        raise DataError(
            f"{folder} holds the set {manifest.name!r}, built from another spec",
            remedy="choose another --out, or remove the folder first",
        )
    record = SourceRecord.read(folder)
    problem = _problem(spec, name, record, sources, folder) if record else ""
    if record is None and not options.again:
        options.report(f"{folder} has no {RECORD}: it is not compared with its images")
    if problem or (options.again and record is None):
        return SetState(problem=problem, is_changed=True)
    try:
        ShardSet.open(folder)
    except DataError:
        return SetState()  # a shard is gone: what is left is kept, and the set made complete again
    num_bytes = sum(s.bytes for s in manifest.shards)
    return SetState(
        Built(name, folder, manifest.num_samples, num_bytes, made=0, kept=len(manifest.shards)), record=record
    )


def _problem(spec: Spec, name: str, record: SourceRecord, sources: dict[str, Source], folder: Path) -> str:
    source = spec.build.sets[name].source
    try:
        found = changes(record, _opened(spec, source, sources))
    except SourceError as error:
        raise SourceError(
            f"{folder} is built, but its images (source {source}) cannot be compared with it: {error.message}",
            remedy=f"{error.remedy}; the set itself can be used as it is",
        ) from error
    return f"{folder} is built, and the images of its source {source} have changed since: {found}" if found else ""


def _opened(spec: Spec, source: str, sources: dict[str, Source]) -> Source:
    if source not in sources:
        sources[source] = spec.open_source(source)
    return sources[source]


def _refuse_changed(states: Mapping[str, SetState], options: BuildOptions) -> None:
    problems = [state.problem for state in states.values() if state.problem]
    for problem in problems:
        options.report(problem)
    if problems and not options.again:
        more = f" (and {len(problems) - 1} more sets)" if len(problems) > 1 else ""
        raise DataError(
            f"{problems[0]}{more}",
            remedy="--again builds the set from the images that are there now; or put them back as they were",
        )


def _check_outside(spec: Spec, out: Path) -> None:
    """Raise UsageError where shards would become images of a source."""
    there = real_path(out)
    for name, source in spec.build.sources.items():
        root = real_path(spec.root(name))
        if source.format.reads_every_file and there.is_relative_to(root):
            raise UsageError(
                f"the shards would be written to {out}, which is inside the source {name} ({root}): "
                "they would become images of a class",
                remedy="choose a folder outside it: --out FOLDER",
            )
    base = next(folder for folder in (there, *there.parents) if folder.exists())
    if not base.is_dir():
        raise DataError(f"{out}: cannot be written: Not a directory", remedy="choose a folder that you can write to")


# --- what will be there ---


def _report_scans(scans: Sequence[Scan], options: BuildOptions) -> None:
    """Report what was found. Raises SourceError where images cannot be used and are not to be left out."""
    for found in scans:
        for line in _lines(found):
            options.report(line)
    bad = [found for found in scans if found.unusable]
    if bad and not options.skip_bad:
        raise SourceError(
            f"{'; '.join(map(_in_short, bad))}. Nothing was written",
            remedy="--skip-bad leaves these out and records them in the manifest; or repair or remove them",
        )


def _lines(found: Scan) -> Iterator[str]:
    good, bad, others = len(found.usable), len(found.unusable), len(found.ignored)
    yield (
        f"source {found.source.name}: {good + bad + others:,} found: {good:,} images, "
        f"{bad:,} that cannot be used, {others:,} passed over"
    )
    converted = [f"{count:>8,}  {what}" for what, count in found.converted(found.usable).items()]
    for title, rows in {
        "cannot be used": list(table(found.unusable)),
        "converted": converted,
        "passed over": list(table(found.ignored)),
    }.items():
        if rows:
            yield f"{title}:"
            yield from rows


def _in_short(found: Scan) -> str:
    reasons = by_reason(found.unusable)
    first = "; ".join(f"{reason}: {first_names(names)}" for reason, names in list(reasons.items())[:SHOWN])
    more = f"; and {len(reasons) - SHOWN} more reasons" if len(reasons) > SHOWN else ""
    bad = len(found.unusable)
    return f"source {found.source.name}: {bad:,} of {len(found.usable) + bad:,} images cannot be used ({first}{more})"


def _plans(
    spec: Spec, todo: Sequence[str], scans: Mapping[str, Scan], states: Mapping[str, SetState], report: Report
) -> list[SetPlan]:
    plans = [plan_set(spec, name, scans[spec.build.sets[name].source]) for name in todo]
    check_same_classes(plans)
    finished = [SetImages.of(name, spec.role(name), s.record) for name, s in states.items() if s.built and s.record]
    plans, lines = with_equal_images(plans, finished)
    for line in lines:
        report(line)
    return plans


# --- doing it ---


def _claim(plan: SetPlan, folder: Path, *, again: bool, report: Report) -> None:
    """Mark `folder` as this plan's, and remove files of other plans. Raises DataError if it is of another build."""
    with plain_disk_errors(folder / BUILD):
        folder.mkdir(exist_ok=True)
        there = sorted(p.name for p in folder.iterdir())
    mark = {"format": "livt-build", **plan.facts, "content_sha256": plan.content_sha256}
    before = _mark_in(folder)
    is_stale = again
    if before is not None:
        if not again and not _same_set(before, mark):
            raise DataError(
                f"{folder} holds an unfinished build from another spec",
                remedy="choose another --out, or remove the folder first",
            )
        if before != mark:
            report(f"{plan.name}: the images or options are not those of the unfinished build: it starts again")
            is_stale = True
    elif (folder / MANIFEST).exists() and not again:
        if ShardManifest.read(folder).source != plan.facts["source"]:
            raise DataError(
                f"{folder} is incomplete, and the images now are not those it was built from",
                remedy="--again builds it from those that are there now; or choose another --out",
            )
        mark = {}  # the manifest says which build this is
    elif not again and (left := [name for name in there if not name.startswith(PREFIX)]):
        raise DataError(
            f"{folder} holds files that no build put there: {', '.join(left[:3])}",
            remedy="choose another --out, or remove the folder first",
        )
    with plain_disk_errors(folder / BUILD):
        # Stale shards first, the mark of this build last: a kill in between leaves nothing that is taken for it.
        for name in sorted(there, key=lambda name: name == MANIFEST):
            if name.startswith(PREFIX) or (is_stale and _is_ours(plan, name)):
                (folder / name).unlink()
        if mark and before != mark:
            write_atomic(folder / BUILD, json.dumps(mark, indent=1).encode())
    if again and QUARANTINE in there:
        report(f"{plan.name}: the quarantine named samples of the earlier build and is removed; verify the set again")


def _mark_in(folder: Path) -> dict[str, object] | None:
    if not (folder / BUILD).exists():
        return None
    try:
        mark = read_json(folder / BUILD, "record")
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}


def _same_set(before: Mapping[str, object], mark: Mapping[str, object]) -> bool:
    """Whether two marks are of one set of one spec, if of other images."""

    def spec_of(found: Mapping[str, object]) -> tuple[object, object]:
        source = found.get("source")
        return found.get("name"), source.get("spec_sha256") if isinstance(source, dict) else None

    return spec_of(before) == spec_of(mark)


def _is_ours(plan: SetPlan, name: str) -> bool:
    is_shard = re.fullmatch(rf"{re.escape(plan.name)}-[0-9]{{6,}}\.tar", name)
    return bool(is_shard) or name in (MANIFEST, INDEX, KEYS, QUARANTINE, RECORD)


def _build_set(plan: SetPlan, folder: Path, *, workers: int, progress: Progress | None) -> Built:
    known = {}
    if (folder / MANIFEST).exists():
        known = {s.name: s.sha256 for s in ShardManifest.read(folder).shards}
    names = [plan.shard_name(k) for k in range(plan.num_shards)]
    jobs = (ShardJob(folder / name, plan.part(k), known.get(name), plan.prepare) for k, name in enumerate(names))
    shards: dict[int, Shard] = {}
    samples = num_bytes = 0
    made = in_processes(make_shard, jobs, workers=workers, num_jobs=len(names), prepare=load_extensions)
    for number, shard in made:
        shards[number] = shard
        samples, num_bytes = samples + shard.info.samples, num_bytes + shard.info.bytes
        if progress:
            progress(plan.name, samples, len(plan.order), num_bytes)
    plan.record().write(folder)
    publish(
        folder,
        [shards[k] for k in range(plan.num_shards)],
        class_names=list(plan.source.class_names),
        class_counts=[int(n) for n in plan.class_counts],
        **plan.facts,
    )
    (folder / BUILD).unlink(missing_ok=True)
    kept = sum(s.was_there for s in shards.values())
    return Built(plan.name, folder, samples, num_bytes, made=len(names) - kept, kept=kept)


def _alone(folder: Path) -> FileLock:
    """Hold `folder` against a second build."""
    try:
        with plain_disk_errors(folder / LOCK):
            return file_lock(folder / LOCK, remove=True)
    except LockHeld as error:
        raise DataError(
            f"another process builds in {folder}: {error.holder}", remedy=f"{error.remedy}; or choose another --out"
        ) from None
