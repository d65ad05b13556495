"""`python -m tests.parity FOLDER`: compares this model's numbers with the official code's, recorded in case folders."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.errors import MissingError, UserError, command
from tests.parity.comparison import Comparison
from tests.parity.evaluation import compare_answers, compare_choices, compare_retrieval
from tests.parity.forward import compare_forward
from tests.parity.loading import compare_finetuning_start, compare_hub_start
from tests.parity.recorded import compare_pure
from tests.parity.training import compare_steps

# By the group that a case's case.json names.
COMPARISONS: dict[str, Callable[[Path], Comparison]] = {
    "train": compare_forward,
    "init": compare_finetuning_start,
    "vqa_init": compare_finetuning_start,
    "ret_eval": compare_retrieval,
    "vqa": compare_answers,
    "mc": compare_choices,
    "pure": compare_pure,
    "steps": compare_steps,
    "hub": compare_hub_start,
}


def find_cases(folder: Path) -> list[Path]:
    """Case folders in `folder`, or `folder` itself when it is one, in order of name.

    Raises FileNotFoundError when there is none.
    """
    if (folder / "case.json").is_file():
        return [folder]
    cases = sorted(path.parent for path in folder.glob("*/case.json")) if folder.is_dir() else []
    if not cases:
        raise MissingError(f"{folder} has no cases: give a folder whose sub-folders have a case.json")
    return cases


def compare_case(folder: Path) -> Comparison:
    """Compare one case. Raises ValueError when its group is unknown."""
    group = json.loads((folder / "case.json").read_text()).get("group")
    if group not in COMPARISONS:
        raise UserError(f"{folder}/case.json: group {group!r} is none of {', '.join(COMPARISONS)}")
    return COMPARISONS[group](folder)


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity",
        description="Run every case of FOLDER (each a checkpoint, its inputs and recorded outputs) in float32 on the "
        "CPU, and print for each the largest absolute deviation and the largest relative to its tolerance. Exit code 1 "
        "when a case is beyond its tolerance.",
    )
    parser.add_argument("folder", type=Path, help="a folder of cases, or one case")
    options = parser.parse_args(arguments)
    failed = 0
    cases = find_cases(options.folder)
    sys.stdout.write(f"{'case':<32} {'values':>6}  {'deviation':>9}  {'/ allowed':>9}  of\n")
    for folder in cases:
        result = compare_case(folder)
        failed += not result.passed
        sys.stdout.write(
            f"{result.case:<32} {result.count:>6}  {result.largest:>9.1e}  {result.worst:>9.3f}  {result.worst_of}"
            f"{'' if result.passed else '   FAILED'}\n"
        )
        for note in result.notes[:10]:
            sys.stdout.write(f"    {note}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(cases) - failed} of {len(cases)} cases within tolerance\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
