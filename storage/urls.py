"""URLs of stores: joined, normalized, and shown without secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from runtime.errors import UserError

SECRET_OPTIONS = re.compile(r"secret|password|passwd|token|key|credential|sas|authorization", re.I)
HARMLESS_TOKENS = ("anon", "cloud", "google_default", "cache", "browser")  # gcsfs: ways to find a token


def join_url(folder: str, name: str) -> str:
    """`folder/name` for local paths and fsspec URLs alike."""
    return folder.rstrip("/") + "/" + name


def plain_scheme(url: str) -> str:
    """A URL with its scheme in lower case, as fsspec requires."""
    scheme, sign, rest = url.partition("://")
    return scheme.lower() + sign + rest if sign else url


def is_local(url: str, options: Mapping[str, Any]) -> bool:
    """Whether a URL is a folder of this machine; options: of fsspec."""
    return isinstance(fsspec.url_to_fs(url, **options)[0], LocalFileSystem)


def public_url(url: str) -> str:
    """A URL for logs: without user, password, query and fragment."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rsplit("@", 1)[-1], query="", fragment="").geturl()


def hide_secrets(text: str) -> str:
    """A text for logs: its URLs without users, passwords and queries."""
    return re.sub(r"\w+://[^\s'\"<>]+", lambda match: public_url(match[0]), text)


def check_no_credentials(url: str, options: Mapping[str, Any]) -> None:
    """Raise UserError, without repeating them, if a URL or its options contain credentials.

    They would be written to logs and to a run's folder.
    """
    where = "take credentials from the environment instead (AWS_*, GOOGLE_APPLICATION_CREDENTIALS, ~/.aws, ~/.netrc)"
    parts = urlsplit(url) if "://" in url else None
    if parts is not None and ("@" in parts.netloc or parts.query):
        raise UserError(f"the URL of {public_url(url)} contains a user, a password or a signature: {where}")
    for name, value in options.items():
        if SECRET_OPTIONS.search(name) and value not in HARMLESS_TOKENS:
            raise UserError(f"storage.{name} contains credentials: {where}")


def local_form(url: str) -> str:
    """A local folder as a plain path, any other URL with its scheme in lower case."""
    return plain_scheme(url).removeprefix("file://")
