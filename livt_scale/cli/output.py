"""What commands print: text for people and JSON, on stdout unless it is an error.

Names of files, tensors, classes and checkpoints are part of it, and somebody else may have chosen them. So unprintable
characters are escaped here, except the newlines and tabs of our layout.
"""

from __future__ import annotations

import logging

import typer

from livt_scale.util.text import escaped

_log = logging.getLogger(__name__)


def starting(what: str, step: str = "loading PyTorch") -> None:
    """Log what a command is about to do, before it does what takes seconds, such as importing torch."""
    _log.info("%s: %s", what, step)


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print `text`, a line or several, with control characters and escape sequences spelled out."""
    typer.echo(escaped(text, keep="\n\t"), err=err, nl=nl)
