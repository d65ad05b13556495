"""`python -m sharding.answers`: the list of answers to rank, from the questions of packed corpora."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from runtime.errors import UserError, command
from runtime.program import command_line
from storage.files import write_text


def answer_list(corpora: Sequence[str], size: int = 0, least: int = 1) -> list[str]:
    """The answers that at least `least` questions have, most frequent first; at most `size`, 0 for all.

    Raises FileNotFoundError, ValueError: as `read_corpus`, or no answer is that frequent.
    """
    from sharding.shards.schema import read_corpus, read_index

    counts: Counter[str] = Counter()
    for corpus in map(read_corpus, corpora):
        for shard in range(len(corpus.shards)):
            for questions in read_index(corpus, shard).column("questions").to_pylist():
                counts.update(answer for question in questions for answer in question["answers"])
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    kept = [answer for answer, count in ranked if count >= least][: size or None]
    if not kept:
        raise UserError(f"{', '.join(corpora)}: no answer of {least} questions or more; pack questions first")
    return kept


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        command_line("sharding.answers"),
        description="Write the answers of packed training corpora as the JSON list that question answering ranks.",
    )
    result.add_argument("corpora", nargs="+", metavar="CORPUS", help="folders or URLs of packed corpora")
    result.add_argument("--size", type=int, default=0, help="maximum number of answers, by frequency (default: all)")
    result.add_argument(
        "--least", type=int, default=1, help="minimum number of questions for an answer (default: %(default)s)"
    )
    result.add_argument("--output", required=True, metavar="FILE", help="the JSON file to write")
    return result


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    answers = answer_list(options.corpora, options.size, options.least)
    target = Path(options.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps(answers, ensure_ascii=False, indent=0) + "\n")
    sys.stdout.write(f"{options.output}: {len(answers)} answers\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
