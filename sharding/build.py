"""`python -m sharding.build`: annotations and media files to webdataset shards with their indices."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from runtime.errors import command
from runtime.flags import add_flags, changed
from runtime.program import command_line
from sharding.settings import BuildSettings, read_settings

if TYPE_CHECKING:
    from sharding.shards.schema import Corpus


def build_corpus(annotations: Sequence[str], media_root: str, media_type: str, output: str, **settings: Any) -> Corpus:
    """`pack` annotated media into shards at `output`, a folder or an fsspec URL; settings: others of `BuildSettings`.

    Raises TypeError: there is no such setting. Whatever `pack` raises.
    """
    from sharding.packing import pack

    given = {"annotations": annotations, "media_root": media_root, "media_type": media_type, "output": output}
    return pack(changed(BuildSettings(), given | settings))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        command_line("sharding.build"),
        description="Pack images or videos with their texts into webdataset shards.",
        epilog="Exit code: 0 packed; 1 too many media failed; 2 user error; 130 interrupted.",
    )
    result.add_argument(
        "--corpus",
        default="",
        metavar="YAML",
        help="YAML that describes the files of a data set, see configs/corpora/; flags override it",
    )
    result.add_argument(
        "--dry-run", action="store_true", help="write nothing; estimate size and time from a sample of the media"
    )
    add_flags(result, BuildSettings)
    return result


@command("interrupted: run the same command again to continue")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    flags = {"progress": True, **vars(parser().parse_args(arguments))}
    dry_run = flags.pop("dry_run")
    settings = read_settings(flags, corpus=flags.pop("corpus"))
    from sharding.packing import estimate, pack

    if dry_run:
        sys.stdout.writelines(f"{line}\n" for line in estimate(settings))
    else:
        pack(settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
