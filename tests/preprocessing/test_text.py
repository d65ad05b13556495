"""Cleaning and tokenising as in the official code."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import preprocessing.text as text_module
from preprocessing.text import Tokenizer, clean_text


def test_cleaning() -> None:
    assert clean_text(' A "dog" (brown), runs!  ') == "a dog brown runs"
    assert clean_text("black-and-white <person> hat\n") == "black and white person hat"
    assert clean_text("half-eaten and/or  cold") == "half eaten and or cold"


def test_ids_begin_with_cls_and_have_no_sep(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer.encode(["a large red star", "a", "a red star and a blue ring " * 9], 12)
    assert ids.shape == mask.shape == (3, 12)
    assert (ids[:, 0] == tokenizer.cls_id).all()
    assert not (ids == tokenizer.sep_id).any()
    assert mask.sum(1).tolist() == [5, 2, 12]
    assert ((ids == tokenizer.pad_id) == (mask == 0)).all()
    assert tokenizer.decode(ids[0].tolist()) == "a large red star"
    answer, _ = tokenizer.encode(["red [SEP]"], 5)
    assert answer[0].tolist()[2] == tokenizer.sep_id


def test_a_saved_tokenizer_loads_again(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    again = Tokenizer.load(str(tmp_path))
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode(["a star"], 4)[0].tolist() == tokenizer.encode(["a star"], 4)[0].tolist()


def test_a_file_that_is_no_vocabulary_is_an_error(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a vocabulary file"):
        Tokenizer.load(str(tmp_path / "vocab.txt"))
    (tmp_path / "bad.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"lacks \[CLS\], \[MASK\], \[PAD\]"):
        Tokenizer.load(str(tmp_path / "bad.txt"))


@given(st.lists(st.text(alphabet="abcdsrtéß李 \t\x1c[SEP]'-.é", max_size=40), min_size=1, max_size=4))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_of_single_words_equal_those_of_the_whole_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    ids, mask = tokenizer.encode(texts, 12)
    for text, row, shown in zip(texts, ids.tolist(), mask.tolist(), strict=True):
        whole = [tokenizer.cls_id, *tokenizer._tokenizer.encode(text, add_special_tokens=False).ids][:12]
        assert row == whole + [tokenizer.pad_id] * (12 - len(whole))
        assert shown == [1] * len(whole) + [0] * (12 - len(whole))


def test_the_cache_of_words_is_bounded(shapes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "WORDS_KEPT", 50)
    own = Tokenizer.load(str(shapes.vocab))
    for number in range(40):
        own.encode([f"a large word{number} {number}"], 8)
        assert len(own._words) <= 50
    fresh = Tokenizer.load(str(shapes.vocab))
    assert torch.equal(own.encode(["a large red star"], 8)[0], fresh.encode(["a large red star"], 8)[0])
