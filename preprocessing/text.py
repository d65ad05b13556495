"""Captions and questions to token ids: the official cleaning, BERT's WordPiece, fixed length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from runtime.activity import keep_alive
from runtime.errors import MissingError, UserError
from runtime.packages import PREFIX, find_in_package

DELETED = re.compile(r"[,.'!?\"()*#:;~]")
ID = np.dtype(np.int32)
WORDS_KEPT = 200_000  # whose ids are cached
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def clean_text(text: str) -> str:
    """A caption or question as the model was trained on it (singularity.md, section 4)."""
    text = DELETED.sub("", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


class Tokenizer:
    """BERT's WordPiece over a vocabulary file; encodes `[CLS] pieces ...` without a closing `[SEP]`."""

    def __init__(self, vocab: str | Path) -> None:
        self.path = Path(vocab)
        try:
            missing = set(SPECIAL) - set(self.path.read_text(encoding="utf-8").splitlines())
        except UnicodeDecodeError:
            raise UserError(f"{vocab} is not a text file, so it is not a BERT vocabulary: give a vocab.txt") from None
        if missing:
            raise UserError(f"{vocab} lacks {', '.join(sorted(missing))}: it is not a BERT vocabulary")
        self._tokenizer = tokenizers.Tokenizer(WordPiece.from_file(str(vocab), unk_token="[UNK]"))
        self._tokenizer.add_special_tokens(list(SPECIAL))
        self._tokenizer.normalizer = BertNormalizer(lowercase=True)
        self._tokenizer.pre_tokenizer = BertPreTokenizer()
        self._tokenizer.decoder = WordPieceDecoder()
        vocabulary = self._tokenizer.get_vocab()
        self.pad_id, _, self.cls_id, self.sep_id, self.mask_id = (vocabulary[token] for token in SPECIAL)
        self.vocab_size = len(vocabulary)
        self._words: dict[str, bytes] = {}

    @classmethod
    def load(cls, name: str) -> Tokenizer:
        """From a `vocab.txt`, a folder or a package that holds one, or a tokenizer's name on the Hugging Face hub.

        Raises FileNotFoundError: none of these is there. ValueError: the file is not a BERT vocabulary.
        """
        path = find_in_package(name, ["vocab.txt"], "tokenizer") if name.startswith(PREFIX) else Path(name)
        if path.is_dir() and (path / "vocab.txt").exists():
            return cls(path / "vocab.txt")
        if path.is_file():
            return cls(path)
        if path.suffix == ".txt" or len(path.parts) > 2 or path.is_dir():
            raise MissingError(
                f"tokenizer: {name} is neither a vocabulary file nor a folder with a vocab.txt: "
                "give the one that the model was trained with"
            )
        return cls(hub_vocabulary(name))

    @property
    def special_ids(self) -> dict[str, int]:
        """pad_id, cls_id and mask_id, as arguments of the models' constructors."""
        return {"pad_id": self.pad_id, "cls_id": self.cls_id, "mask_id": self.mask_id}

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask (B, max_length) int64 of B texts, cut and padded to that length."""
        split = [text.split(" ") for text in texts]
        known = self._known(split)
        begin, most = as_bytes([self.cls_id]), ID.itemsize * max_length
        rows = [b"".join([begin, *[known[word] for word in words]])[:most] for words in split]
        lengths = np.array([len(row) // ID.itemsize for row in rows], np.int64)
        mask = np.arange(max_length) < lengths[:, None]
        input_ids = np.full((len(texts), max_length), self.pad_id, np.int64)
        input_ids[mask] = np.frombuffer(b"".join(rows), ID)
        return torch.from_numpy(input_ids), torch.from_numpy(mask.astype(np.int64))

    def _known(self, texts: Sequence[Sequence[str]]) -> dict[str, bytes]:
        """The ids of each word of the texts, and of earlier ones; words between spaces do not influence each other.

        Encoding a caption takes as long as reading its photo, and nearly all its words have been seen before.
        """
        known = self._words
        new = list({word for words in texts for word in words if word not in known})
        if len(known) + len(new) > WORDS_KEPT:  # a new dictionary: another thread may be reading the old one
            known = {}
            new = list({word for words in texts for word in words})
        encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False) if new else []
        known.update((word, as_bytes(encoding.ids)) for word, encoding in zip(new, encodings, strict=True))
        self._words = known
        return known

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without padding and special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's entry of each id."""
        return [self._tokenizer.id_to_token(number) or "" for number in ids]

    def save(self, folder: str | Path) -> Path:
        """Write `vocab.txt` into a folder; a checkpoint carries its own vocabulary."""
        target = Path(folder) / "vocab.txt"
        target.write_bytes(self.path.read_bytes())
        return target


def as_bytes(ids: Sequence[int]) -> bytes:
    """Ids as bytes: one object in memory instead of one a number."""
    return np.array(ids, ID).tobytes()


def hub_vocabulary(name: str) -> str:
    """Local path of a hub tokenizer's vocabulary; raises FileNotFoundError saying what to set instead."""
    from huggingface_hub import snapshot_download  # unlike hf_hub_download it fails at once without a network

    try:
        with keep_alive(f"fetching {name}"):
            return str(Path(snapshot_download(name, allow_patterns=["vocab.txt"])) / "vocab.txt")
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        raise MissingError(
            f"tokenizer={name} is not a local file or folder, and the download from the Hugging Face hub failed "
            f"({type(error).__name__}): check the name and the network, or set tokenizer=/path/to/vocab.txt"
        ) from None
