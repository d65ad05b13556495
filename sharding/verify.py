"""`python -m sharding.verify`: checks a packed corpus byte by byte, and rebuilds files from intact tars."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from runtime.errors import UserError, command
from runtime.flags import positive
from runtime.program import command_line
from runtime.progress import LOG_EVERY
from sharding.arguments import folder_of_shards

if TYPE_CHECKING:
    from sharding.shards.checks import Fault


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        command_line("sharding.verify"),
        description="Check a packed corpus byte by byte.",
        epilog="Exit code: 0 intact or repaired; 1 faults; 2 user error.",
    )
    add = result.add_argument
    add("url", metavar="URL", type=folder_of_shards, help="folder or URL of the corpus, or of some of its tars")
    add("--decode", action="store_true", help="also decode every frame")
    add("--repair", action="store_true", help="rebuild broken or missing indices, corpus.json and failures.parquet")
    add("--workers", type=positive, default=None, help="worker processes (default: one per core)")
    add("--json", action="store_true", help="print one JSON object instead of lines")
    add("--log-every", type=float, default=LOG_EVERY, metavar="SECONDS", help=f"see {command_line('sharding.build')}")
    return result


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if all is intact, 1 with faults, 2 for user errors."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parser().parse_args(arguments)
    from sharding.shards.repair import repair
    from sharding.shards.schema import named_shards
    from sharding.shards.verification import examine
    from storage.policy import storage_errors

    done: list[str] = []
    how = (options.decode, options.workers or os.cpu_count() or 1, True, options.log_every)
    with storage_errors(options.url, "read"):
        if options.repair and named_shards(options.url)[1]:
            raise UserError(f"--repair is for a whole corpus: give its folder {named_shards(options.url)[0]}")
        findings = examine(options.url, *how)
        faults = findings.all
        left = faults
        if options.repair and faults:
            done = repair(findings.url, findings.corpus, findings.reports)
            left = examine(options.url, *how).all
    if options.json:
        found = {"faults": [asdict(fault) for fault in faults], "repaired": done}
        sys.stdout.write(json.dumps({"url": options.url, **found, "left": [asdict(fault) for fault in left]}) + "\n")
    else:
        sys.stdout.write(outcome(options.url, faults, done, left, options.repair))
    return 1 if left else 0


def outcome(url: str, faults: list[Fault], done: list[str], left: list[Fault], repaired: bool) -> str:
    """The report as text."""
    lines = [str(fault) for fault in faults]
    lines.append(f"{url}: {len(faults) or 'no'} fault{'s' if len(faults) != 1 else ''}")
    if repaired and faults:
        lines += [f"repaired: {line}" for line in done]
        lines += [f"cannot be repaired: {fault}" for fault in left]
    tars = sorted({fault.file for fault in left if fault.file.endswith(".tar")})
    if tars:
        lines.append(
            f"damaged or missing tars, such as {tars[0]}, cannot be repaired: delete the .parquet beside each and "
            "run the same sharding.build again, or download the tars again"
        )
    elif left and not repaired:
        lines.append("all of this can be rebuilt: run this with --repair")
    return "".join(f"{line}\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
