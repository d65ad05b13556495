"""`python -m launch.reproduce ROW`: repeats a row of the paper's tables and compares the numbers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import UserError, command
from runtime.program import as_started, command_line

EPILOG = """\
Without ROW: all rows with their published numbers. With ROW: what is missing and where it comes from, else the
commands (pack, fine-tune with --train, evaluate), and the numbers beside the published ones. What is done already is
not done again. Exit code: 0 within the tolerance; 1 outside of it, or another test set; 2 an error, or something is
missing; otherwise that of the command that failed."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        command_line("launch.reproduce"),
        description=as_started(__doc__),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("row", nargs="?", metavar="ROW", help="a row, such as msrvtt_17m_zero_shot")
    result.add_argument("settings", nargs="*", metavar="key=value", help="settings of fine-tuning and evaluation")
    result.add_argument(
        "--downloads",
        type=Path,
        default=Path("downloads"),
        help="folder of what was fetched: checkpoints, annotations, media (default: %(default)s)",
    )
    result.add_argument(
        "--output",
        type=Path,
        default=Path("runs/reproduce"),
        help="folder of the results (default: %(default)s)",
    )
    result.add_argument(
        "--checkpoint",
        metavar="FILE",
        help="evaluate this one; with --train start from it (default: the released one)",
    )
    result.add_argument(
        "--train",
        action="store_true",
        help="fine-tune from the pre-trained checkpoint instead of evaluating the released one",
    )
    result.add_argument("--dry-run", action="store_true", help="print what is missing and the commands, run nothing")
    result.add_argument(
        "--tolerance",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="largest difference from a published number (default: %(default)s)",
    )
    result.add_argument(
        "--num-accelerators",
        type=int,
        default=0,
        metavar="N",
        help="processes (default: one for each GPU)",
    )
    return result


@command("interrupted: run the same command again to continue")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_intermixed_args(arguments)
    from launch.reproduce.comparing import report
    from launch.reproduce.rows import find_row
    from launch.reproduce.running import run
    from launch.reproduce.steps import Reproduction

    if options.row is None:
        sys.stdout.write(listing())
        return 0
    row = find_row(options.row)
    if options.train and row.zero_shot:
        raise UserError(f"{row.name} is zero-shot: leave out --train")
    places = (options.downloads, options.output, options.checkpoint)
    task = Reproduction(row, *places, options.train, options.settings, options.num_accelerators)
    missing = task.missing()
    for path, source in missing.items():
        sys.stdout.write(f"# missing: {path}\n#    from: {source}\n")
    if options.dry_run:
        sys.stdout.writelines(f"{step}\n" for step in task.commands())
        return 0
    if missing:
        raise UserError(
            f"{row.name} lacks {len(missing)} files or folders, listed above: fetch them, or set --downloads"
        )
    code = run(task)
    if code == 0:
        text, code = report(task, options.tolerance)
        sys.stdout.write(f"{text}\n")
    return code


def listing() -> str:
    """All rows as text."""
    from launch.reproduce.rows import rows

    lines = [f"{'row':<28}{'frames':>6}  published"]
    for row in rows().values():
        numbers = "; ".join(
            f"{split} {' '.join(f'{name} {value:g}' for name, value in metrics.items())}"
            for split, metrics in row.published.items()
        )
        lines.append(f"{row.name:<28}{row.num_frames:>6}  {numbers}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
