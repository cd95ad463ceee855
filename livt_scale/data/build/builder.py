"""Make shard sets: `build` from raw images as a spec says, `index_tars` beside tars that others wrote; `info`.

    raw images -> choice by the long-tail profile -> one shuffle by seed -> even cuts -> shards -> index -> manifest

The shuffle happens once, when written, so that no block of a shard is of one class. Shards are written in parallel;
their bytes do not depend on who writes them. A build that is killed is resumed by the same command: finished shards
stay, and the result has the bytes of an uninterrupted build. Until the manifest exists, `build.json` says which build
the folder belongs to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from livt_scale.data.build.sources import Source
from livt_scale.data.build.spec import Spec
from livt_scale.data.build.tar import shown
from livt_scale.data.build.writer import Prepare, Shard, ShardJob, make_shard, publish, scan_shard
from livt_scale.data.manifest import FORMAT, MANIFEST, VERSION, ShardManifest
from livt_scale.data.shard_set import ShardSet
from livt_scale.extensions import load_extensions
from livt_scale.longtail import choose, imbalance_factor, shuffled
from livt_scale.util.atomic import PREFIX, FileLock, LockHeld, file_lock, plain_disk_errors, write_atomic
from livt_scale.util.errors import DataError, ManifestError, SampleError, SourceError
from livt_scale.util.process_pool import in_processes, usable_cores

BUILD = "build.json"
LOCK = ".build.lock"
Progress = Callable[[str, int, int, int], None]  # set, samples done, samples in all, bytes done


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
class SetPlan:
    """Which image goes where: decided before anything is written."""

    name: str
    source: Source
    class_counts: NDArray[np.int64]
    order: NDArray[np.int64]  # images of the source, as they are written
    cuts: NDArray[np.int64]  # [num_shards + 1] where in `order` each shard begins
    facts: dict[str, Any]  # of the manifest: what it was made from
    prepare: Prepare | None

    def shard_name(self, shard: int) -> str:
        return f"{self.name}-{shard:06d}.tar"

    def part(self, shard: int) -> Source:
        return self.source.part(self.order[self.cuts[shard] : self.cuts[shard + 1]])

    @property
    def num_shards(self) -> int:
        return len(self.cuts) - 1


def build(spec: Spec, out: str | Path, *, workers: int | None = None, progress: Progress | None = None) -> list[Built]:
    """Build every set of `spec`, each into its folder below `out`. Sets that are finished are left as they are.

    Raises SourceError (raw images), DataError (a folder of something else, disk full). Shards that are finished are
    kept whatever happens; a manifest is only there if all is.
    """
    out = Path(out)
    done = {name: _finished(spec, name, out / name) for name in spec.build.sets}
    if None not in done.values():
        return [built for built in done.values() if built]
    with plain_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        done = {name: _finished(spec, name, out / name) for name in spec.build.sets}
        todo = [name for name, built in done.items() if built is None]
        opened = {source: spec.open_source(source) for source in {spec.build.sets[name].source for name in todo}}
        plans = [_plan(spec, name, opened[spec.build.sets[name].source]) for name in todo]
        _same_classes(plans)
        for plan in plans:
            _claim(plan, out / plan.name)
        for plan in plans:
            done[plan.name] = _build_set(plan, out / plan.name, workers=workers or usable_cores(), progress=progress)
    return [built for built in done.values() if built]


def _finished(spec: Spec, name: str, folder: Path) -> Built | None:
    """What is there, if it is whole; None if there is work to do. Raises DataError if it is of another spec."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = ShardManifest.read(folder)
    if manifest.source.get("spec_sha256") != _spec_sha256(spec, name):
        raise DataError(
            f"{folder} holds the set {manifest.name!r}, built from another spec",
            remedy="choose another --out, or remove the folder first",
        )
    try:
        ShardSet.open(folder)
    except DataError:
        return None  # a shard is gone: what is left is kept, and the set made whole again
    num_bytes = sum(s.bytes for s in manifest.shards)
    return Built(name, folder, manifest.num_samples, num_bytes, made=0, kept=len(manifest.shards))


def _plan(spec: Spec, name: str, source: Source) -> SetPlan:
    seed, part = spec.build.seed, spec.build.sets[name]
    counts = spec.class_counts(name, source)
    try:
        chosen = choose(source.labels, counts, seed=seed)
    except DataError as error:
        raise SourceError(f"set {name}, source {source.name}: {error.message}", remedy=error.remedy) from error
    order = chosen[shuffled(len(chosen), seed=seed)]
    num_shards = -(-len(order) // part.shard_samples)
    cuts = np.arange(num_shards + 1) * len(order) // num_shards
    plan = hashlib.sha256(cuts.tobytes())
    for i in order:
        plan.update(f"{source.key(i)} {source.label(i)}\n".encode())
    facts = {
        "spec": spec.neutral(name),
        "spec_sha256": _spec_sha256(spec, name),
        "plan_sha256": plan.hexdigest(),
    }
    return SetPlan(name, source, counts, order, cuts, {"name": name, "seed": seed, "source": facts}, part.prepare)


def _spec_sha256(spec: Spec, name: str) -> str:
    facts = [FORMAT, VERSION, spec.build.seed, spec.build.class_names, name, spec.neutral(name)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _same_classes(plans: list[SetPlan]) -> None:
    for plan in plans[1:]:
        first = plans[0]
        if plan.source.class_names != first.source.class_names:
            raise SourceError(
                f"the sets {first.name} and {plan.name} have different classes "
                f"({len(first.source.class_names)} and {len(plan.source.class_names)})",
                remedy="give class_names in the spec, the same for all",
            )


def _claim(plan: SetPlan, folder: Path) -> None:
    """Mark `folder` as this plan's, and clear what a killed build left half-written. Raises DataError if it is not."""
    with plain_disk_errors(folder / BUILD):
        folder.mkdir(exist_ok=True)
        there = sorted(p.name for p in folder.iterdir())
    mark = json.dumps({"format": "livt-build", **plan.facts}, indent=1).encode()
    if (folder / BUILD).is_file():
        if (folder / BUILD).read_bytes() != mark:
            raise DataError(
                f"{folder} holds an unfinished build from another spec or other images",
                remedy="choose another --out, or remove the folder first",
            )
    elif (folder / MANIFEST).exists():
        manifest = ShardManifest.read(folder)
        if manifest.source != plan.facts["source"]:
            raise DataError(
                f"{folder} is incomplete, and the images now are not those it was built from",
                remedy="choose another --out, or remove the folder first",
            )
    elif left := [name for name in there if not name.startswith(PREFIX)]:
        raise DataError(
            f"{folder} holds files that no build put there: {', '.join(left[:3])}",
            remedy="choose another --out, or remove the folder first",
        )
    else:
        with plain_disk_errors(folder / BUILD):
            write_atomic(folder / BUILD, mark)
    with plain_disk_errors(folder):
        for name in there:
            if name.startswith(PREFIX):
                (folder / name).unlink()


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


def index_tars(
    folder: str | Path,
    *,
    class_names: list[str] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> ShardSet:
    """Make manifest, index and keys for the tars in `folder`, which stay as they are.

    Raises ShardError and SampleError (shard, offset, key) for what cannot be a shard, DataError for a folder that was
    built from a spec.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists() and "spec_sha256" in ShardManifest.read(folder).source:
        raise DataError(f"{folder} was built from a spec and has its manifest", remedy="there is nothing to do")
    paths = _tars(folder)
    shards: dict[int, Shard] = {}
    num_bytes = 0
    for number, shard in in_processes(scan_shard, paths, workers=workers or usable_cores(), num_jobs=len(paths)):
        shards[number] = shard
        num_bytes += shard.info.bytes
        if progress:
            progress(folder.name, len(shards), len(paths), num_bytes)
    ordered = [shards[k] for k in range(len(paths))]
    labels = np.concatenate([s.rows["label"] for s in ordered]).astype(np.int64)
    names = class_names or [str(c) for c in range(int(labels.max(initial=-1)) + 1)]
    _check_indexed(folder, ordered, num_classes=len(names))
    publish(
        folder,
        ordered,
        name=folder.resolve().name,
        seed=None,
        class_names=names,
        class_counts=[int(n) for n in np.bincount(labels, minlength=len(names))],
        source={"indexed": True},
    )
    return ShardSet.open(folder)


def _tars(folder: Path) -> list[Path]:
    remedy = "give the folder that holds the tars"
    try:
        paths = sorted(p for p in folder.iterdir() if p.name.endswith(".tar") and p.is_file())
    except OSError as error:
        raise ManifestError(f"{folder}: {error.strerror}", remedy=remedy) from error
    if not paths:
        raise ManifestError(f"{folder} holds no .tar", remedy=remedy)
    return paths


def _check_indexed(folder: Path, shards: list[Shard], *, num_classes: int) -> None:
    """No key twice in the folder, and no label outside the classes."""
    seen: dict[bytes, str] = {}
    for shard in shards:
        start = 0
        for row in shard.rows:
            key = shard.keys[start : int(row["key_end"])]
            start = int(row["key_end"])
            where = f"{shown(folder / shard.info.name)}, offset {row['start']}, key {key.decode()!r}"
            if key in seen:
                raise SampleError(
                    f"{where}: the key is there twice, also in {seen[key]}", remedy="each sample needs a unique key"
                )
            if row["label"] >= num_classes:
                raise SampleError(f"{where}: the label {row['label']} is outside the {num_classes} classes")
            seen[key] = shard.info.name
    if not seen:
        raise SampleError(f"{folder}: there is no sample in its tars", remedy="a sample is key.jpg|png + key.cls")


def info(folder: str | Path) -> dict[str, Any]:
    """What a set holds, as plain values for printing or JSON."""
    shards = ShardSet.open(folder)
    manifest, counts = shards.manifest, shards.class_counts
    lost = np.array(manifest.class_counts, dtype=np.int64) - counts
    factor = imbalance_factor(counts)
    return {
        "name": manifest.name,
        "samples": shards.num_samples,
        "quarantined": len(shards.quarantine),
        "bytes": sum(s.bytes for s in manifest.shards),
        "shards": len(manifest.shards),
        "image_types": manifest.image_types,
        "classes": shards.num_classes,
        "class_names": manifest.class_names,
        "class_counts": counts.tolist(),
        "quarantined_by_class": lost.tolist(),
        "largest_class": int(counts.max()),
        "smallest_class": int(counts.min()),
        "imbalance_factor": factor if np.isfinite(factor) else None,
        "seed": manifest.seed,
        "source": manifest.source,
    }
