"""What commands print: text for people and JSON, on stdout unless it is an error.

Names of files, tensors, classes and checkpoints are part of it, and somebody else may have chosen them. So unprintable
characters are escaped here, except the newlines and tabs of our layout.
"""

from __future__ import annotations

import typer

from livt_scale.util.text import escaped


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print `text`, a line or several, with control characters and escape sequences spelled out."""
    typer.echo(escaped(text, keep="\n\t"), err=err, nl=nl)
