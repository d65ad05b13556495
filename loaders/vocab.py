"""`python -m loaders.vocab`: learns a WordPiece vocabulary from the texts of packed corpora."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import BertWordPieceTokenizer

from loaders.config import LoaderConfig
from loaders.index import ShardIndex
from loaders.storage import open_corpus
from loaders.text import SPECIAL, clean_text
from sharding.errors import UserError, command


def corpus_texts(url: str, config: LoaderConfig) -> Iterator[str]:
    """Every caption, question, answer and option of a corpus, cleaned."""
    reader = open_corpus(url, config, open_shards=1)
    try:
        for shard in range(len(reader.corpus.shards)):
            yield from index_texts(reader.index(shard))
    finally:
        reader.close()


def index_texts(index: ShardIndex) -> Iterator[str]:
    """Those of one shard."""
    for row in range(len(index)):
        yield from map(clean_text, index.texts("captions", row))
        for question in index.texts("questions", row):
            yield from map(clean_text, [question["question"], *question["answers"]])
        for choice in index.texts("choices", row):
            yield from map(clean_text, choice["options"])


def learn_vocabulary(corpora: Sequence[str], size: int, output: str | Path) -> int:
    """Write a BERT `vocab.txt` of at most `size` entries; returns how many it has.

    Raises:
        FileNotFoundError, ValueError: as `sharding.schema.read_corpus`, or the corpora hold no text.
    """
    texts = [text for url in corpora for text in corpus_texts(url, LoaderConfig())]
    if not texts:
        raise UserError(f"{', '.join(corpora)}: no texts to learn a vocabulary from")
    return learn_from_texts(texts, size, output)


def learn_from_texts(texts: Sequence[str], size: int, output: str | Path) -> int:
    """Write a BERT `vocab.txt` of at most `size` entries for these texts; returns how many it has."""
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(
        texts, vocab_size=size, min_frequency=2, special_tokens=list(SPECIAL), show_progress=False
    )
    words = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text("".join(f"{word}\n" for word, _ in words), encoding="utf-8")
    os.replace(partial, target)
    return len(words)


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m loaders.vocab",
        description="Learn a WordPiece vocabulary from packed corpora, for training from scratch.",
    )
    parser.add_argument("corpora", nargs="+", metavar="CORPUS", help="folders or URLs of packed corpora")
    parser.add_argument("--size", type=int, default=8000, help="largest number of entries (default: %(default)s)")
    parser.add_argument("--output", required=True, metavar="FILE", help="the vocab.txt to write")
    options = parser.parse_args(arguments)
    count = learn_vocabulary(options.corpora, options.size, options.output)
    sys.stdout.write(f"{options.output}: {count} entries\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
