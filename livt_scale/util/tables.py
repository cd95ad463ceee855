"""Tables and progress on a terminal, by rich, with names shown as they are.

    plain_console().print(plain_table(["what", "tensors"], [["used", "12"]], title="x.pth"))
    with plain_bar("shards") as bar: bar.add_task(escaped(name), total=12)

rich reads markup in text: a class called `[red]x[/]` would be red and without its brackets, `[link=…]` would become a
link, and `[/b]` is an error. Names of classes, tensors, sets and folders come from others, so every cell is a rich
Text, which holds no markup, with control characters escaped, and the console reads neither markup nor emoji codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from livt_scale.util.text import escaped


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints strings as they are, once they are escaped."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def plain_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    justify: Literal["left", "right"] = "left",
) -> Table:
    """A table of strings, none of which is read as markup, on any console."""
    table = Table(title=Text(escaped(title), style="table.title") if title else None)
    for name in columns:
        table.add_column(Text(escaped(name)), justify=justify)
    for row in rows:
        table.add_row(*(Text(escaped(cell)) for cell in row))
    return table


def plain_bar(*texts: str) -> Progress:
    """Bars on stderr with `texts` to their right, which may name fields of a task: "{task.fields[loss]}"."""
    columns = [TextColumn(text, markup=False) for text in texts]
    return Progress(
        TextColumn("{task.description}", style="progress.description", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        *columns,
        ElapsedColumn(),
        RemainingColumn(),
        console=plain_console(stderr=True),
        expand=True,
    )


def plain_line(text: str = "") -> Text:
    """A line that is cut where the terminal ends; its `plain` can be changed."""
    return Text(escaped(text), no_wrap=True, overflow="ellipsis")


class ElapsedColumn(ProgressColumn):
    """elapsed 0:01:12"""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.elapsed
        return Text(f"elapsed {time_text(seconds or 0.0)}", style="progress.elapsed")


class RemainingColumn(ProgressColumn):
    """remaining 0:02:24, at rich's estimate of the speed"""

    def render(self, task: Task) -> Text:
        seconds = task.time_remaining
        return Text(f"remaining {'-:--:--' if seconds is None else time_text(seconds)}", style="progress.remaining")


def time_text(seconds: float) -> str:
    """0:02:24, or 3 days, 4:05:06."""
    return str(timedelta(seconds=round(seconds)))
