"""Locations of data: a folder, or a URL without secrets in it.

    is_url("s3://bucket/train")                    True
    url_problem("https://me:pw@host/train")        "it holds a user name or password"
    redacted("GET https://me:pw@host/x?sig=1")     "GET https://host/x?…"

A URL ends up in recipes, logs, metrics and errors, so one that holds credentials is refused before it goes anywhere.
They come from the environment or the usual profile files instead (docs/loader.md).
"""

from __future__ import annotations

import re
from urllib.parse import quote, urlsplit

SCHEMES = ("file", "http", "https", "s3")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s'\"<>]*@)?([^\s'\"<>?#@]*)([?#][^\s'\"<>]*)?")


def is_url(location: str) -> bool:
    return "://" in location


def url_problem(url: str) -> str | None:
    """Why `url` cannot be where shards lie, in words that do not repeat it; None if it can."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return "it is not a URL that can be read (a user name or password in it is not taken either)"
    if parts.scheme not in SCHEMES:
        return f"URLs of shards begin with {', '.join(f'{s}://' for s in SCHEMES)}"
    if "@" in parts.netloc:
        return "it holds a user name or password: take them out, credentials come from the environment or profile files"
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        return "it holds a query (?…) or fragment (#…), as signed links do: give the plain URL of the folder"
    if not url.isprintable() or " " in url:
        return "it holds a space or an unprintable character: write it as %20 or the like"
    if not (parts.path if parts.scheme == "file" else parts.netloc):
        return "it names no place: give scheme://host/folder, s3://bucket/folder or file:///folder"
    return None


def below(url: str, name: str) -> str:
    """The URL of the file `name` in the folder `url`; its scheme in small letters, as libraries want it."""
    scheme, _, place = url.partition("://")
    scheme = scheme.lower()
    if scheme in ("http", "https"):
        name = quote(name)
    return f"{scheme}://{place.rstrip('/')}/{name}"


def redacted(text: str) -> str:
    """Untrusted `text` with user, password, query and fragment removed from all URLs in it."""
    return _URL.sub(lambda m: m[1] + m[2] + ("?…" if m[3] else ""), text)
