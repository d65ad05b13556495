"""`python -m sharding.index`: indexes webdataset shards that other tools wrote, in place, without repacking them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from runtime.errors import command
from runtime.flags import positive
from runtime.program import command_line
from runtime.progress import LOG_EVERY
from sharding.annotations.config import parse_pairs
from sharding.arguments import folder_of_shards


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        command_line("sharding.index"),
        description="Index existing webdataset shards, local or remote, in place; run again to continue.",
        epilog="Exit code: 0 indexed; 1 indexed but for damaged tars or too many samples; 2 user error.",
    )
    add = result.add_argument
    add(
        "url",
        metavar="URL",
        type=folder_of_shards,
        help="folder or URL of the .tar files, or some of them: 'FOLDER/x-{000..009}.tar'",
    )
    add("--fps", type=float, default=0.0, help="frame rate of clips where the shards do not state it")
    add("--output", default="", metavar="URL", help="folder for the indices, if you cannot write beside the tars")
    add("--workers", type=positive, default=os.cpu_count() or 1, help="worker processes (default: one per core)")
    add(
        "--max-failures",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="allowed share of failures (default: %(default)s)",
    )
    add(
        "--extra-columns",
        nargs="+",
        default=[],
        metavar="KEY=TYPE",
        help="keys of KEY.json to keep in the index, with their type float, int, bool or str, such as similarity=float",
    )
    add("--log-every", type=float, default=LOG_EVERY, metavar="SECONDS", help=f"see {command_line('sharding.build')}")
    return result


@command("interrupted: run the same command again to continue")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = vars(parser().parse_args(arguments))
    options["extra_columns"] = parse_pairs("--extra-columns", options["extra_columns"])
    from sharding.shards.indexing import index_shards
    from storage.policy import storage_errors

    with storage_errors(options["url"], "read"):
        corpus = index_shards(progress=True, **options)
    sys.stdout.write(f"{corpus.url}: {len(corpus.shards)} shards, {corpus.samples} samples\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
