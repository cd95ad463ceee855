"""`livt shards`: build shards from raw images, verify and inspect them.

livt shards build shards/fashion-mnist-lt.yaml --out data/fashion-mnist-lt
livt shards verify data/fashion-mnist-lt/train-lt --decode
livt shards index downloads/tars              a manifest for tars that others wrote
livt shards info data/fashion-mnist-lt/train-lt
livt shards trace recipes/fashion_mnist_lt/quickstart.yaml --epoch 3 --step 5 --world-size 4 --rank 1
livt shards bench recipes/fashion_mnist_lt/quickstart.yaml --gpus 8 --images-per-s-per-gpu 1200
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from livt_scale.cli.options import AsJson, RecipeFile, Sets
from livt_scale.cli.output import echo
from livt_scale.cli.progress import MIB, progress_of
from livt_scale.cli.shards_bench import bench

if TYPE_CHECKING:
    from livt_scale.config.recipe import Stage
    from livt_scale.data.build.verify import Fault

app = typer.Typer(help="Build, verify and inspect shards.", no_args_is_help=True)
MAX_FAULTS = 20  # shown; --json has all
MAX_CLASSES = 20  # rows of the histogram
BAR = 40  # characters of the longest bar

Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="Folder or URL of shards, with manifest.json.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one per core")]


@app.command("build")
def build(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="A YAML file, or livt:NAME for a shipped one.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the sets.", show_default="beside SPEC; shards/NAME for livt:NAME")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER: raw files of a source. NAME.FIELD=PATH: one of its files."),
    ] = None,
    resize_shorter: Annotated[
        int | None, typer.Option(min=1, help="Shrink images to this shorter side (px); none is enlarged.")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=50, max=100, help="JPEG quality of shrunk images.", show_default="92")
    ] = None,
    ignore_expected: Annotated[
        bool, typer.Option("--ignore-expected", help="Build although counts differ from the published set.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out images that cannot be used; the manifest lists them.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Build sets again whose source images have changed.")] = False,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Decode every image before the build, or read headers only.")
    ] = True,
    workers: Workers = None,
) -> None:
    """Build shards from a spec; resume an interrupted build."""
    from livt_scale.data.build.builder import BuildOptions
    from livt_scale.data.build.builder import build as build_shards
    from livt_scale.data.build.spec import load_spec
    from livt_scale.data.build.writer import Prepare
    from livt_scale.util.errors import UsageError
    from livt_scale.util.resources import is_name

    if quality and not resize_shorter:
        raise UsageError("--quality is that of images made smaller", remedy="add --resize-shorter 256")
    prepare = Prepare(resize_shorter=resize_shorter, quality=quality or 92) if resize_shorter else None
    loaded = load_spec(spec, overrides=source or (), prepare=prepare, ignore_expected=ignore_expected)
    # A shipped spec may be in a folder of the system; recipes look for its sets in shards/ here.
    out = out or (Path("shards") if is_name(spec) else loaded.folder) / loaded.build.name
    options = BuildOptions(skip_bad=skip_bad, again=again, decode=decode, report=echo)
    with progress_of("images") as progress:
        built = build_shards(loaded, out, options=options, workers=workers, progress=progress)
    for one in built:
        there = f" ({one.kept} were there)" if one.kept and one.made else ""
        state = f"{one.made} shards written{there}" if one.made else "finished already, nothing to do"
        echo(f"{one.folder}: {one.num_samples:,} images, {one.num_bytes / MIB:.1f} MiB: {state}")


@app.command("verify")
def verify(
    folder: Folder,
    decode: Annotated[bool, typer.Option("--decode", help="Also decode every image.")] = False,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="List bad samples beside the manifest; training skips them.")
    ] = False,
    as_json: AsJson = False,
    workers: Workers = None,
) -> None:
    """Compare every byte of the shards with their manifest.

    Exit codes: 0; 1 if anything differs and is not quarantined.
    """
    from livt_scale.data.build.verify import verify as verify_shards

    with progress_of("shards") as progress:
        faults = verify_shards(folder, decode=decode, quarantine=quarantine, workers=workers, progress=progress)
    if as_json:
        rows = [
            {
                "shard": f.shard,
                "key": f.key,
                "offset": f.offset,
                "what": f.what,
                "quarantined": f.left_out or quarantine,
            }
            for f in faults
        ]
        echo(json.dumps({"whole": not faults, "quarantined": quarantine, "faults": rows}, indent=1))
    else:
        _print_faults(folder, faults, decode=decode, quarantine=quarantine)
    if not quarantine and not all(fault.left_out for fault in faults):
        raise typer.Exit(1)


@app.command("index")
def index(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder of WebDataset tars: key.jpg|jpeg|png + key.cls.")
    ],
    class_names: Annotated[
        Path | None, typer.Option(help="Text file, one name per line.", show_default="the label numbers")
    ] = None,
    workers: Workers = None,
) -> None:
    """Index existing WebDataset tars; they are not changed."""
    from livt_scale.data.build.indexing import class_names_in, index_tars

    names = class_names_in(class_names) if class_names else None
    with progress_of("shards") as progress:
        shards = index_tars(folder, class_names=names, workers=workers, progress=progress)
    empty = [n for n, count in zip(shards.manifest.class_names, shards.manifest.class_counts, strict=True) if not count]
    echo(f"{folder}: {shards.num_samples:,} images of {shards.num_classes} classes: manifest written")
    if empty:
        echo(f"note: {len(empty)} classes have no image ({', '.join(empty[:5])}): they cannot be trained on")


@app.command("info")
def info(
    folder: Folder,
    recipe: Annotated[
        Path | None, typer.Option(help="Also show how often a stage of this recipe sees each class.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="pretrain or finetune.", show_default="the last stage")] = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Show counts, sizes, imbalance factor and a class histogram."""
    from livt_scale.data.inspect import info as shard_info
    from livt_scale.util.errors import UsageError

    if recipe is None and (stage or sets):
        raise UsageError("--stage and --set are about a recipe", remedy="add --recipe RECIPE")
    facts = shard_info(folder)
    if recipe is not None:
        facts["seen"] = _seen(folder, recipe, stage, sets or [])
    if as_json:
        echo(json.dumps(facts, indent=1))
        return
    factor = facts["imbalance_factor"]
    each = facts["bytes"] / max(facts["samples"] + facts["quarantined"], 1)
    echo(f"{facts['name']}: {facts['samples']:,} images ({', '.join(facts['image_types'])}) in {folder}")
    echo(f"shards            {facts['shards']}, {facts['bytes'] / MIB:.1f} MiB, {each:,.0f} bytes an image")
    echo(f"classes           {facts['classes']}: {facts['largest_class']:,} to {facts['smallest_class']:,} images")
    echo(f"imbalance factor  {'no image in a class' if factor is None else f'{factor:g}'}")
    if facts["quarantined"]:
        echo(f"in quarantine     {facts['quarantined']}: {_by_class(facts)}")
    for line in _about_the_build(facts["source"]):
        echo(line)
    if recipe is not None:
        for line in _seen_table(facts["seen"]):
            echo(line)
        return
    for line in histogram(facts["class_names"], facts["class_counts"]):
        echo(line)


@app.command("trace")
def trace(
    recipe: RecipeFile,
    world_size: Annotated[int, typer.Option(min=1, help="Number of ranks.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="Rank whose samples to list.")] = 0,
    epoch: Annotated[int, typer.Option(min=0, help="Epoch.")] = 0,
    step: Annotated[int | None, typer.Option(min=0, help="Step of the epoch.", show_default="all")] = None,
    stage: Annotated[str | None, typer.Option(help="pretrain or finetune.", show_default="the first stage")] = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """List the samples that a rank sees, step by step.

    Uses the loader's own order and reads no image.
    """
    from livt_scale.config.load import load_recipe
    from livt_scale.data.inspect import rank_samples

    loaded = load_recipe(recipe, sets=sets or [])
    chosen = _chosen(stage, loaded.stage_names)
    seen = rank_samples(loaded, chosen, rank=rank, world_size=world_size, epoch=epoch, step=step)
    if as_json:
        echo(json.dumps(seen))
        return
    echo(f"{chosen}, epoch {epoch} of {seen['steps_per_epoch']} steps, rank {rank} of {world_size}")
    for one in seen["steps"]:
        echo(f"step {one['step']}: {' '.join(one['keys'])}")


app.command("bench")(bench)


def _seen(folder: str, recipe: Path, stage: str | None, sets: list[str]) -> dict[str, Any]:
    from livt_scale.config.load import load_recipe
    from livt_scale.data.inspect import class_report
    from livt_scale.data.shard_set import ShardSet

    loaded = load_recipe(recipe, sets=sets)
    chosen = _chosen(stage, loaded.stage_names[::-1])
    return class_report(ShardSet.open(folder), loaded, chosen)


def _chosen(stage: str | None, names: Sequence[Stage]) -> Stage:
    """The first of a recipe's stages `names`, or the one that is called `stage`."""
    from livt_scale.util.errors import UsageError, nearest

    chosen = next((name for name in names if name == (stage or name)), None)
    if chosen is None:
        raise UsageError(f"the recipe has no stage {stage!r}", remedy=nearest(str(stage), names))
    return chosen


def _seen_table(seen: dict[str, Any]) -> list[str]:
    """One row per class, largest first; with many classes, as many evenly spaced ones as fit."""
    sampling = seen["sampling"]
    policy = sampling["policy"] + (f" from {sampling['from']} to {sampling['to']}" if "from" in sampling else "")
    views = f", {seen['repeats']} views each" if seen["repeats"] > 1 else ""
    rows = [
        f"{seen['stage']} draws {policy}{views}: {seen['epochs']} epochs of {seen['steps_per_epoch']} steps, "
        f"{seen['draws_per_epoch']:,} draws"
    ]
    classes = _even_ranks(sorted(seen["classes"], key=lambda c: -c["images"]))
    width = max([5, *(min(len(c["class"]), 24) for c in classes)])
    heads = ("images", "first epoch", "last epoch", "stage", "each image")
    rows.append(f"  {'class':<{width}}" + "".join(f"  {head:>12}" for head in heads))
    for c in classes:
        each = f"{c['stage'] / c['images']:,.1f}" if c["images"] else "-"
        counts = (f"{c[name]:,}" for name in ("images", "first_epoch", "last_epoch", "stage"))
        rows.append(f"  {c['class'][:24]:<{width}}" + "".join(f"  {value:>12}" for value in (*counts, each)))
    if len(classes) < len(seen["classes"]):
        rows.append(f"  … {len(classes)} of {len(seen['classes'])} classes (--json lists all)")
    return rows


def _even_ranks(ranked: list[Any]) -> list[Any]:
    if len(ranked) <= MAX_CLASSES:
        return ranked
    return [ranked[k * (len(ranked) - 1) // (MAX_CLASSES - 1)] for k in range(MAX_CLASSES)]


def histogram(names: list[str], counts: list[int]) -> list[str]:
    """Bars for the classes by size, largest first; of many classes, as many of even ranks as fit."""
    shown = _even_ranks(sorted(range(len(counts)), key=lambda c: -counts[c]))
    width = max((min(len(names[c]), 24) for c in shown), default=0)
    most = max(counts, default=0) or 1
    rows = []
    for c in shown:
        bar = "█" * round(BAR * counts[c] / most) or ("▏" if counts[c] else "")
        rows.append(f"  {names[c][:24]:<{width}}  {counts[c]:>8,}  {bar}")
    return rows


def _about_the_build(source: dict[str, Any]) -> Iterator[str]:
    """What the build left out, converted or found twice."""
    if left_out := source.get("left_out"):
        total = sum(row["count"] for row in left_out.values())
        yield f"left out          {total}: {_counted(left_out)}"
    if converted := source.get("converted"):
        yield f"converted         {', '.join(f'{count} {what}' for what, count in converted.items())}"
    if equal := source.get("equal_images"):
        yield f"equal images      {_counted(equal)}"


def _counted(rows: dict[str, Any]) -> str:
    return ", ".join(f"{row['count']} {what}" for what, row in rows.items())


def _by_class(facts: dict[str, Any]) -> str:
    lost = zip(facts["class_names"], facts["quarantined_by_class"], strict=True)
    return ", ".join(f"{count} of class {name}" for name, count in lost if count)


def _print_faults(folder: str, faults: list[Fault], *, decode: bool, quarantine: bool) -> None:
    if not faults:
        echo(f"{folder}: every byte matches the manifest" + ("; every image can be decoded" if decode else ""))
        return
    for fault in faults[:MAX_FAULTS]:
        echo(str(fault))
    if len(faults) > MAX_FAULTS:
        echo(f"… and {len(faults) - MAX_FAULTS} more (--json lists all)")
    if not quarantine and all(fault.left_out for fault in faults):
        echo("training leaves them out already; everything else matches the manifest")
    elif not quarantine and all(fault.number is not None for fault in faults):
        decode_too = " --decode" if decode else ""
        echo(f"to leave these samples out: livt shards verify {folder}{decode_too} --quarantine")
    if quarantine:
        from livt_scale.data.inspect import info as shard_info

        facts = shard_info(folder)
        echo(f"in quarantine: {facts['quarantined']} samples: {_by_class(facts)}. Training leaves them out")
