"""`python -m sharding.index`: indexes webdataset shards that other tools wrote, in place, without repacking them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from runtime.errors import command
from runtime.flags import positive
from runtime.progress import LOG_EVERY
from sharding.arguments import folder_of_shards
from sharding.shards.indexing import index_shards
from storage.policy import storage_errors


@command("interrupted: run the same command again to go on")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(
        "python -m sharding.index",
        description="Index existing webdataset shards, local or remote, in place; run again to go on.",
        epilog="Exit code: 0 indexed; 1 indexed but for damaged tars or too many samples; 2 not possible.",
    )
    add = parser.add_argument
    add(
        "url",
        metavar="URL",
        type=folder_of_shards,
        help="folder or URL that holds the .tar files, or some of them: 'FOLDER/x-{000..009}.tar'",
    )
    add("--fps", type=float, default=0.0, help="frame rate of clips where the shards do not state it")
    add("--output", default="", metavar="URL", help="folder of the indices, where those of the tars cannot be written")
    add("--workers", type=positive, default=os.cpu_count() or 1, help="processes (default: one a core)")
    add("--max-failures", type=float, default=0.05, metavar="SHARE", help="of the samples (default: %(default)s)")
    add("--log-every", type=float, default=LOG_EVERY, metavar="SECONDS", help="see sharding.build")
    options = vars(parser.parse_args(arguments))
    with storage_errors(options["url"], "read"):
        corpus = index_shards(progress=True, **options)
    sys.stdout.write(f"{corpus.url}: {len(corpus.shards)} shards, {corpus.samples} samples\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
