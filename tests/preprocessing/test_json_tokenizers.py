"""Vocabularies as a tokenizer.json: the ids that transformers computes, and the same ids from a saved copy."""

import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, CLIPTokenizer

from preprocessing.text import NO_MASK, JsonTokenizer, Tokenizer, WordPieceTokenizer, find_vocabulary

TEXTS = ["a cat sits", "A CAT!", "", "cats  sit at a cat at a cat at a cat"]


def clip_folder(folder):
    """CLIP's tokenizer with few merges, as transformers writes it: it pads with the token that ends a text."""
    letters = [*"acist!", "!</w>", *(f"{letter}</w>" for letter in "acist")]
    merges = [("a", "t</w>"), ("c", "at</w>")]
    words = [*letters, "at</w>", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges)
    tokenizer.save_pretrained(folder)
    return folder


def gemma_folder(folder):
    """The form of SigLIP2's files: begins and ends are in the configuration only, and nothing says lower case."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *"acist!▁", "at"]
    backend = Backend(BPE({word: i for i, word in enumerate(words)}, [("a", "t")], unk_token="<unk>", fuse_unk=True))
    backend.add_special_tokens(words[:5])
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    config |= {"add_bos_token": False, "add_eos_token": True, "tokenizer_class": "GemmaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    return folder


def test_clip_texts_have_the_published_form(tmp_path):
    ours, theirs = Tokenizer.load(str(clip_folder(tmp_path))), AutoTokenizer.from_pretrained(tmp_path)
    ids, mask = ours.encode(TEXTS, 8)
    expected = theirs(TEXTS, max_length=8, padding="max_length", truncation=True, return_tensors="pt")
    assert ids.tolist() == expected.input_ids.tolist()
    assert mask.tolist() == expected.attention_mask.tolist()
    assert (ours.pad_id, ours.sep_id, ours.mask_id) == (ours.vocab_size - 1, ours.vocab_size - 1, NO_MASK)
    assert ours.clean("A cat!") == "A cat!"
    assert ours.decode(ids[0].tolist()) == "a cat sits"


def test_siglip_texts_are_lower_case_and_end_with_the_end_token(tmp_path):
    tokenizer = Tokenizer.load(str(gemma_folder(tmp_path)))
    assert (tokenizer.pad_id, tokenizer.sep_id, tokenizer.cls_id, tokenizer.mask_id) == (0, 1, 2, 4)
    ids, mask = tokenizer.encode(TEXTS[1:3], 8)
    assert tokenizer.pieces(ids[0].tolist()) == ["<bos>", "a", "▁", "c", "at", "!", "<eos>", "<pad>"]
    assert mask.sum(1).tolist() == [7, 2]
    assert tokenizer.encode(["cat cat cat cat"], 5)[0][0, -1] == tokenizer.sep_id


@pytest.mark.parametrize("folder", [clip_folder, gemma_folder])
def test_a_saved_vocabulary_encodes_alike_without_the_files_beside_it(tmp_path, folder):
    first = Tokenizer.load(str(folder(tmp_path / "published")))
    (tmp_path / "saved").mkdir()
    assert first.save(tmp_path / "saved").name == "tokenizer.json"
    again = Tokenizer.load(str(tmp_path / "saved"))
    assert again.content == first.content
    assert again.special_ids == first.special_ids
    assert again.encode(TEXTS, 8)[0].tolist() == first.encode(TEXTS, 8)[0].tolist()


def test_modernbert_texts_have_the_published_form(tmp_path):
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *"acist!Ġ", "at"]
    backend = Backend(BPE({word: i for i, word in enumerate(words)}, [("a", "t")], unk_token="[UNK]"))
    backend.add_special_tokens(words[:5])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(str(tmp_path / "tokenizer.json"))
    assert tokenizer.special_ids == {"pad_id": 3, "cls_id": 1, "mask_id": 4}
    assert tokenizer.encode(["at a cat"], 9)[0].tolist() == [[1, *backend.encode("at a cat").ids[1:], 3]]


def test_what_is_no_vocabulary_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"nor a folder with a vocab\.txt or a tokenizer\.json"):
        Tokenizer.load(str(tmp_path))


def test_a_bert_folder_with_both_files_is_read_by_its_vocab_txt(tmp_path):
    gemma_folder(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncat\n")
    assert find_vocabulary(tmp_path) == tmp_path / "vocab.txt"
    assert isinstance(Tokenizer.load(str(tmp_path)), WordPieceTokenizer)
    assert isinstance(Tokenizer.load(str(tmp_path / "tokenizer.json")), JsonTokenizer)
