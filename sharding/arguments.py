"""Command-line argument of the commands on packed corpora: the URL of a corpus."""

from __future__ import annotations

import argparse
import re


def folder_of_shards(text: str) -> str:
    """The URL of a corpus, or of tars in it, of the command line; the URL of another file is an error."""
    from sharding.shards.schema import named_shards

    try:
        named_shards(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if re.search(r"\.(parquet|json)$", text):
        folder = text.rpartition("/")[0] or "."
        raise argparse.ArgumentTypeError(f"{text} is a file: give the folder that holds the shards, such as {folder}")
    return text
