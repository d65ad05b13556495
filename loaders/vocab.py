"""`python -m loaders.vocab`: learns a WordPiece vocabulary from the texts of packed corpora."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from loaders.config import LoaderConfig
from runtime.errors import UserError, command
from runtime.program import command_line
from storage.files import write_text

ALPHABET = 1000  # characters that words may consist of, at most
WORDS_OF_A_TEXT = 1000


def corpus_texts(url: str, config: LoaderConfig) -> Iterator[str]:
    """Every caption, question, answer and option of a corpus, cleaned."""
    from loaders.shards import open_corpus
    from preprocessing.text import clean_text

    reader = open_corpus(url, config, open_shards=1)
    try:
        for shard in range(len(reader.corpus.shards)):
            index = reader.index(shard)
            for row in range(len(index)):
                yield from map(clean_text, index.texts("captions", row))
                for question in index.texts("questions", row):
                    yield from map(clean_text, [question["question"], *question["answers"]])
                for choice in index.texts("choices", row):
                    yield from map(clean_text, choice["options"])
    finally:
        reader.close()


def learn_vocabulary(corpora: Sequence[str], size: int, output: str | Path) -> int:
    """Write a BERT `vocab.txt` of at most `size` entries for all texts of corpora; returns how many it has.

    Raises FileNotFoundError, ValueError: as `sharding.shards.schema.read_corpus`, or the corpora have no text.
    """
    texts = (text for url in corpora for text in corpus_texts(url, LoaderConfig()))
    return learn_from_texts(texts, size, output, ", ".join(corpora))


def learn_from_texts(texts: Iterable[str], size: int, output: str | Path, source: str = "the texts") -> int:
    """The same for any texts, independent of their order; raises UserError if `source` has none."""
    from preprocessing.text import SPECIAL

    smallest = len(SPECIAL) + 2
    if size < smallest:
        raise UserError(f"--size {size} is too small for a vocabulary: give at least {smallest}")
    counts = count_words(texts)
    if not counts:
        raise UserError(f"{source}: no texts to learn a vocabulary from")
    entries = learn_entries(counts, size)
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, "".join(f"{entry}\n" for entry in entries))
    return len(entries)


def count_words(texts: Iterable[str]) -> Counter[str]:
    """The count of each word, split as by `Tokenizer` (punctuation marks are separate words)."""
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normalizer, splitter = BertNormalizer(lowercase=True), BertPreTokenizer()
    between_spaces = Counter(word for text in texts for word in text.split())
    counts: Counter[str] = Counter()
    for text, count in between_spaces.items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            counts[word] += count
    return counts


def learn_entries(counts: Mapping[str, int], size: int) -> list[str]:
    """The entries of a WordPiece vocabulary for these words: special tokens, characters, then pieces as learned.

    The trainer numbers the characters within words ("##a") in the random order of a hash table, and breaks ties
    between equally frequent pieces by those numbers. So it gets all characters in order, as special tokens: this fixes
    the entries and their order.
    """
    import tokenizers
    from tokenizers.models import WordPiece
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.trainers import WordPieceTrainer

    from preprocessing.text import SPECIAL

    frequency: Counter[str] = Counter()
    for word, count in counts.items():
        for character in word:
            frequency[character] += count
    by_frequency = sorted(frequency, key=lambda character: (-frequency[character], character))
    alphabet = set(by_frequency[: min(ALPHABET, (size - len(SPECIAL)) // 2)])
    known = {word: count for word, count in sorted(counts.items()) if alphabet.issuperset(word)}  # others are [UNK]
    within = {f"##{character}" for word in known for character in word[1:]}
    first = [*SPECIAL, *sorted(alphabet), *sorted(within)]

    tokenizer = tokenizers.Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    trainer = WordPieceTrainer(vocab_size=size, min_frequency=2, special_tokens=first, show_progress=False)
    tokenizer.train_from_iterator(_repeated(known), trainer)
    entries = tokenizer.get_vocab()
    return sorted(entries, key=entries.__getitem__)


def _repeated(counts: Mapping[str, int]) -> Iterator[str]:
    """Each word as often as it occurs; the trainer takes texts, not counts."""
    for word, count in counts.items():
        for begin in range(0, count, WORDS_OF_A_TEXT):
            yield " ".join([word] * min(WORDS_OF_A_TEXT, count - begin))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        command_line("loaders.vocab"),
        description="Learn a WordPiece vocabulary from packed corpora, for training from scratch.",
    )
    result.add_argument("corpora", nargs="+", metavar="CORPUS", help="folders or URLs of packed corpora")
    result.add_argument("--size", type=int, default=8000, help="largest number of entries (default: %(default)s)")
    result.add_argument("--output", required=True, metavar="FILE", help="the vocab.txt to write")
    return result


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    count = learn_vocabulary(options.corpora, options.size, options.output)
    sys.stdout.write(f"{options.output}: {count} entries\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
