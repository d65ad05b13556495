"""A vocabulary depends only on the texts, not on their order or the process that learns it."""

import itertools
import random
import subprocess
import sys

import pytest

from loaders.vocab import learn_from_texts
from preprocessing.text import SPECIAL, Tokenizer, clean_text
from runtime.errors import UserError

TIES = ["".join(letters) for letters in itertools.product("abcd", repeat=4) for _ in range(3)]
CHINESE = ["".join(chr(0x4E00 + (7 * i + j) % 1500) for j in range(9)) for i in range(900)]
WORDS = [" ".join(random.Random(i).choices(TIES, k=5)) + f" no.{i % 40}, isn't it?" for i in range(300)]


@pytest.mark.parametrize(("texts", "size"), [(TIES, 200), (CHINESE, 400), (WORDS, 120)], ids=["ties", "han", "words"])
def test_the_order_of_the_texts_does_not_matter(tmp_path, texts, size) -> None:
    learned = set()
    for seed in range(6):
        shuffled = random.Random(seed).sample(texts, len(texts))
        assert learn_from_texts(shuffled, size, tmp_path / "vocab.txt") <= size
        learned.add((tmp_path / "vocab.txt").read_bytes())
    assert len(learned) == 1


def test_every_process_learns_the_same(tmp_path) -> None:
    program = (
        "import sys; from loaders.vocab import learn_from_texts; "
        "learn_from_texts(open(sys.argv[1]).read().splitlines(), 120, sys.argv[2])"
    )
    (tmp_path / "texts").write_text("\n".join(WORDS))
    learned = set()
    for number, threads in enumerate(("1", "2", "4")):
        surroundings = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": str(number)}
        output = tmp_path / f"{number}.txt"
        subprocess.run([sys.executable, "-c", program, tmp_path / "texts", output], check=True, env=surroundings)
        learned.add(output.read_bytes())
    assert len(learned) == 1


def test_the_vocabulary_covers_its_texts_within_its_size(tmp_path) -> None:
    texts = ["Naïve café, isn't it? 中文 mixed-in", "a woman's hat"] * 3
    count = learn_from_texts([clean_text(text) for text in texts], 300, tmp_path / "vocab.txt")
    entries = (tmp_path / "vocab.txt").read_text().splitlines()
    assert tuple(entries[:5]) == SPECIAL
    assert len(set(entries)) == len(entries) == count
    assert {"naive", "cafe", "woman", "中"} <= set(entries)  # accents go, Chinese characters stand alone
    ids, mask = Tokenizer.load(str(tmp_path / "vocab.txt")).encode([clean_text(text) for text in texts], 20)
    assert mask.sum() == 39
    assert not (ids == 1).any()


def test_rare_characters_are_unknown(tmp_path) -> None:
    assert learn_from_texts(["aaab aab c"] * 3, 9, tmp_path / "vocab.txt") <= 9  # room for two characters
    assert (tmp_path / "vocab.txt").read_text().split() == [*SPECIAL, "a", "b", "##a", "##b"]


def test_no_texts_and_too_small_a_size_are_errors(tmp_path) -> None:
    with pytest.raises(UserError, match="the texts: no texts to learn a vocabulary from"):
        learn_from_texts(["", " "], 300, tmp_path / "vocab.txt")
    with pytest.raises(UserError, match="--size 6 is too small for a vocabulary: give at least 7"):
        learn_from_texts(["a"], 6, tmp_path / "vocab.txt")
    assert not (tmp_path / "vocab.txt").exists()
