"""Writes one self-contained HTML page about evaluations: results, published numbers, chance, example queries."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from runtime.errors import command
from runtime.program import command_line
from sharding.shards.outside import check_outside_corpora


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog=command_line("eval.report"), description=__doc__)
    result.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or single RUN/evaluation/LABEL folders")
    result.add_argument("--output", default="report.html", metavar="FILE", help="page to write (default: %(default)s)")
    result.add_argument("--title", default="Evaluation", help="heading of the page (default: %(default)s)")
    return result


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    from eval.report.evaluations import find_evaluations
    from eval.report.page import write_report
    from eval.report.tables import console_table

    check_outside_corpora(options.output, "--output")
    output = write_report(options.runs, options.output, options.title)
    table = console_table(find_evaluations(options.runs))
    sys.stdout.write(f"{table}\n\nreport: {output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
