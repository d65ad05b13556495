"""Writes one self-contained HTML page about evaluations: results, published numbers, chance, example queries."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from eval.report.evaluations import find_evaluations
from eval.report.page import write_report
from eval.report.tables import console_table
from runtime.errors import command
from sharding.shards.outside import check_outside_corpora


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or single RUN/evaluation/LABEL folders")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="page to write (default: %(default)s)")
    parser.add_argument("--title", default="Evaluation", help="heading of the page (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_outside_corpora(options.output, "--output")
    output = write_report(options.runs, options.output, options.title)
    table = console_table(find_evaluations(options.runs))
    sys.stdout.write(f"{table}\n\nreport: {output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
