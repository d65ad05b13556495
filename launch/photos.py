"""Parts the captions of photos for launch/photos.sh: every tenth photo is for the test, the others are for training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started by its path, not by `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime.errors import UserError, command
from storage.files import write_text

EVERY = 10
FORM = '{"image": path, "caption": text or [texts]}'


def write_parts(captions: Path, output: Path) -> None:
    """Write test.json and train.json; all rows of a photo are in one of them.

    Raises UserError where `captions` is no list of photos, or has too few of them.
    """
    try:
        rows = json.loads(captions.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{captions} is not JSON ({error}): give a JSON list of {FORM}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "image" in row for row in rows):
        raise UserError(f"{captions} is not a list of photos: give a JSON list of {FORM}")
    by_photo: dict[str, list[Any]] = {}
    for row in rows:
        by_photo.setdefault(str(row["image"]), []).append(row)
    if len(by_photo) < EVERY:
        raise UserError(
            f"{captions} has {len(by_photo)} photos, of which none can be left out for the test: "
            f"give {EVERY} or more, or captions of other photos, TEST=FILE"
        )
    output.mkdir(parents=True, exist_ok=True)
    for name, is_test in (("test", True), ("train", False)):
        chosen = [row for i, some in enumerate(by_photo.values()) if (i % EVERY == 0) is is_test for row in some]
        write_text(output / f"{name}.json", json.dumps(chosen, ensure_ascii=False) + "\n")


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("captions", type=Path, help=f"JSON list of {FORM}")
    parser.add_argument("output", type=Path, help="folder of test.json and train.json")
    options = parser.parse_args(arguments)
    write_parts(options.captions, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
