"""Paths and URLs of any store as texts: joined, and in the form in which they are compared."""

from __future__ import annotations


def join_url(folder: str, name: str) -> str:
    """`folder/name` for local paths and fsspec URLs alike."""
    return folder.rstrip("/") + "/" + name


def plain_scheme(url: str) -> str:
    """A URL with its scheme in lower case, as stores are known by: HTTP:// means what http:// does."""
    scheme, sign, rest = url.partition("://")
    return scheme.lower() + sign + rest if sign else url


def local_form(url: str) -> str:
    """A local folder as a plain path, any other URL with its scheme in lower case."""
    return plain_scheme(url).removeprefix("file://")
