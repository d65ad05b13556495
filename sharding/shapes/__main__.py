"""`python -m sharding.shapes`: writes the Shapes corpus."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from runtime.errors import command
from runtime.program import command_line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        command_line("sharding.shapes"), description="Generate a data set of coloured shapes with captions."
    )
    result.add_argument("--output", required=True, metavar="DIR", help="an empty or new folder")
    result.add_argument("--images", type=int, default=2000, help="pictures to train on (default: %(default)s)")
    result.add_argument("--clips", type=int, default=500, help="clips to train on (default: %(default)s)")
    result.add_argument(
        "--test-items", type=int, default=256, help="pictures and clips to test on (default: %(default)s)"
    )
    result.add_argument("--size", type=int, default=96, help="width and height in pixels (default: %(default)s)")
    result.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: %(default)s)")
    result.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="worker processes (default: one per core)"
    )
    return result


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = vars(parser().parse_args(arguments))
    from sharding.shapes.write import write_shapes

    folder = write_shapes(options.pop("output"), progress=True, **options)
    sys.stdout.write(f"Shapes in {folder}: media/ and {len(list(folder.glob('*.json')))} annotation files\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
