"""The `livt` command: parse, call one function, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from livt_scale import __version__
from livt_scale.cli import (
    baselines,
    cancel,
    ckpt,
    doctor,
    eval,
    export,
    features,
    import_,
    init,
    job,
    logs,
    plan,
    predict,
    quickstart,
    recipe,
    report,
    reproduce,
    shards,
    status,
    study,
    submit,
    train,
)
from livt_scale.cli.output import echo
from livt_scale.util.errors import (
    EXIT_FAILED,
    EXIT_PREEMPTED,
    EXIT_USAGE,
    LauncherError,
    LivtError,
    UsageError,
    nearest,
)
from livt_scale.util.log import line, to_stderr
from livt_scale.util.text import escaped

EPILOG = """
Examples:

    livt quickstart

    livt train RECIPE --set run_dir=runs/try --set stages.finetune.epochs=50

    torchrun --nproc-per-node 2 -m livt_scale train RECIPE

    livt plan recipes/imagenet_lt/vit_h14.yaml --gpus 64 --device h100

    livt submit RECIPE --set slurm.time_min=60 --dry-run

    livt status runs/try --watch

    livt ckpt ls runs/try

    livt export runs/try --out exports/try

    livt predict exports/try photos --out photos.csv

Exit codes: 0 done, 1 failed, 2 wrong usage, 85 preempted (saved; the same command resumes it).
"""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=EPILOG,
    help="Train Vision Transformers on long-tailed images: masked pretraining, then balanced fine-tuning (LiVT).",
)
_debug = False


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and the debug log.")] = False,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=lambda v: _print_version() if v else None, is_eager=True
        ),
    ] = False,
    # The launchers of DeepSpeed and of older torch write it before the command, beside the variable LOCAL_RANK.
    _local_rank: Annotated[
        int, typer.Option("--local_rank", "--local-rank", hidden=True, help="What launchers add; no effect.")
    ] = 0,
) -> None:
    global _debug
    _debug = debug
    context.with_resource(to_stderr(debug=debug))
    if os.environ.get("LIVT_CODE"):
        from livt_scale.slurm.code_snapshot import check_running_code  # in the processes of a batch job alone

        check_running_code()


def _print_version() -> None:
    echo(f"livt_scale {__version__}")
    raise typer.Exit


app.command()(quickstart.quickstart)
app.command()(init.init)
app.command()(train.train)
app.command()(plan.plan)
app.command()(submit.submit)
app.command()(status.status)
app.command()(cancel.cancel)
app.command()(logs.logs)
app.command(name="eval")(eval.eval_)
app.command()(report.report)
app.command()(export.export)
app.command()(predict.predict)
app.command()(features.features)
app.command()(features.knn)
app.command()(features.probe)
app.command(name="import")(import_.import_)
app.command()(baselines.retrain)
app.command(name="tau-norm")(baselines.tau_norm)
app.command()(baselines.soup)
app.add_typer(shards.app, name="shards")
app.add_typer(ckpt.app, name="ckpt")
app.add_typer(recipe.app, name="recipe")
app.command()(reproduce.reproduce)
app.add_typer(study.app, name="study")
app.command()(doctor.doctor)
app.add_typer(job.app, name="job", hidden=True)


LAUNCHERS = ("accelerate", "accelerate-launch")
RENAMED_OPTIONS = {"--at-once": "--jobs", "--from": "--checkpoint", "--layout": "--to"}
# typer brings click's classes along under a private name
CLICK_ERROR: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


@cache
def command() -> Any:
    """The command line as click has it. Made of the functions' signatures, which takes 0.1 s."""
    made = typer.main.get_command(app)
    _show_plain_types(made)
    return made


def _show_plain_types(made: Any) -> None:
    """In the help, `<int>` for a number with bounds too (typer shows them behind the text), `<path>` for a list."""
    for parameter in made.params:
        has_bounds = getattr(parameter, "min", None) is not None or getattr(parameter, "max", None) is not None
        if parameter.metavar is None and has_bounds:
            parameter.metavar = "<int>" if parameter.type_descriptor.annotation is int else "<float>"
        if parameter.nargs == -1:  # typer shows `<list[Path]>`; all our lists are of paths
            parameter.display_type_rich = lambda **_: "<path>"
    for child in getattr(made, "commands", {}).values():
        _show_plain_types(child)


def main() -> None:
    """Run the command line; an expected error becomes one line on stderr and an exit code, not a traceback."""
    try:
        code = command()(prog_name="livt", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except CLICK_ERROR as error:
        if type(error).__name__ != "NoSuchOption":
            error.show()
            sys.exit(error.exit_code)
        _print_error(unknown_option(error, sys.argv[1:]), "error")
        sys.exit(EXIT_USAGE)
    except typer.Abort:
        print("Aborted!", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except LivtError as error:
        _print_error(error, "stopped" if error.exit_code == EXIT_PREEMPTED else "error")
        if isinstance(error, LauncherError):
            _end_launcher()
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `livt … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except OSError as error:  # a full disk, a read-only file system, a folder that is not ours
        if error.errno is None:
            raise
        _print_error(error, "error")
        sys.exit(EXIT_FAILED)


def _end_launcher() -> None:
    """End accelerate's launcher, if it has started us: below the reason it would print a traceback."""
    import psutil

    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        # python accelerate launch …, or python -m accelerate.commands.launch …
        words = parent.cmdline()[:3] if parent else []
        if parent and any(Path(w).name in LAUNCHERS or w.startswith("accelerate.commands") for w in words):
            parent.terminate()


def unknown_option(error: Any, words: Sequence[str]) -> UsageError:
    """What to say of click's NoSuchOption: its new name, the --set of a recipe's field, or the nearest option."""
    from livt_scale.config.fields import fields_called

    option, context = str(error.option_name), error.ctx
    message = f"{context.command_path} has no option {option}"
    if option in RENAMED_OPTIONS:
        return UsageError(message, remedy=f"it is now called {RENAMED_OPTIONS[option]}")
    known = [name for parameter in context.command.params for name in parameter.opts if name.startswith("--")]
    fields = fields_called(option.lstrip("-").replace("-", "_")) if "--set" in known else []
    if fields:
        value = _value_of(option, words)
        return UsageError(
            message, remedy=f"it is a field of the recipe: {' or '.join(f'--set {name}={value}' for name in fields)}"
        )
    return UsageError(message, remedy=nearest(option, [*known, "--help"]))


def _value_of(option: str, words: Sequence[str]) -> str:
    """What was given for `option`; VALUE: nothing."""
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        if word == option and not following.startswith("-"):
            return shlex.quote(following)
        if word.startswith(f"{option}="):
            return shlex.quote(word.removeprefix(f"{option}="))
    return "VALUE"


def _print_error(error: Exception, kind: str) -> None:
    if _debug:
        traceback.print_exc()
    print(line(kind, escaped(error, keep="\n")), file=sys.stderr, flush=True)
    for note in getattr(error, "__notes__", ()):  # what failed besides
        print(line("note", escaped(note, keep="\n")), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
