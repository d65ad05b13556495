"""Captions and questions to token ids of a fixed length: BERT's WordPiece, or the tokenizer of another encoder."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer, Lowercase
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from runtime.activity import keep_alive
from runtime.errors import MissingError, UserError
from runtime.packages import PREFIX, find_in_package

DELETED = re.compile(r"[,.'!?\"()*#:;~]")
ID = np.dtype(np.int32)
WORDS_KEPT = 200_000  # whose ids are cached
NO_MASK = -1  # the mask_id of a vocabulary without such a token
VOCABULARIES = ("vocab.txt", "tokenizer.json")  # files that a folder may hold, the first of them counts
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def clean_text(text: str) -> str:
    """A caption or question as the model was trained on it (singularity.md, section 4)."""
    text = DELETED.sub("", text.lower()).replace("-", " ").replace("/", " ").replace("<person>", "person")
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


class Tokenizer(ABC):
    """Texts to ids and back. The first token leads a text; `load` chooses the kind by the file."""

    FILE = ""  # the file that a checkpoint carries
    path: Path  # that it was read from
    content: bytes  # of `FILE`; equal for equal vocabularies
    pad_id: int
    cls_id: int  # of the token that leads
    sep_id: int  # of the token that ends a text, of BERT's an answer only
    mask_id: int  # NO_MASK where there is none
    vocab_size: int
    _tokenizer: tokenizers.Tokenizer

    @classmethod
    def load(cls, name: str) -> Tokenizer:
        """From a `vocab.txt` or a `tokenizer.json`, a folder or a package that holds one, or a name on the
        Hugging Face hub.

        Of a folder that holds both the `vocab.txt` is taken.
        Raises FileNotFoundError: none of these is there. ValueError: the file is no vocabulary.
        """
        path = find_in_package(name, VOCABULARIES, "tokenizer") if name.startswith(PREFIX) else Path(name)
        if (found := find_vocabulary(path)) is None:
            if path.suffix in (".txt", ".json") or len(path.parts) > 2 or path.is_dir():
                raise MissingError(
                    f"tokenizer: {name} is neither a vocabulary file nor a folder with a vocab.txt or a "
                    "tokenizer.json: give the one that the model was trained with"
                )
            found = hub_vocabulary(name)
        return JsonTokenizer(found) if found.suffix == ".json" else WordPieceTokenizer(found)

    @property
    def special_ids(self) -> dict[str, int]:
        """pad_id, cls_id and mask_id, as arguments of the models' constructors."""
        return {"pad_id": self.pad_id, "cls_id": self.cls_id, "mask_id": self.mask_id}

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask (B, max_length) int64 of B texts, cut and padded to that length."""
        rows = self._rows(texts, max_length)
        lengths = np.array([len(row) // ID.itemsize for row in rows], np.int64)
        mask = np.arange(max_length) < lengths[:, None]
        input_ids = np.full((len(texts), max_length), self.pad_id, np.int64)
        input_ids[mask] = np.frombuffer(b"".join(rows), ID)
        return torch.from_numpy(input_ids), torch.from_numpy(mask.astype(np.int64))

    @abstractmethod
    def _rows(self, texts: Sequence[str], max_length: int) -> list[bytes]:
        """The ids of each text, as bytes, at most max_length."""

    def clean(self, text: str) -> str:
        """A caption or question as the encoder was trained on such: cleaned for BERT, else as it is."""
        return text

    def answer(self, text: str) -> str:
        """What to encode so that the ids of an answer end with `sep_id`."""
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without padding and special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's entry of each id."""
        return [self._tokenizer.id_to_token(number) or "" for number in ids]

    def save(self, folder: str | Path) -> Path:
        """Write `FILE` into a folder; a checkpoint carries its own vocabulary."""
        target = Path(folder) / self.FILE
        target.write_bytes(self.content)
        return target


class WordPieceTokenizer(Tokenizer):
    """BERT's WordPiece over a `vocab.txt`; encodes `[CLS] pieces ...` without a closing `[SEP]`."""

    FILE = "vocab.txt"

    def __init__(self, vocab: str | Path) -> None:
        self.path = Path(vocab)
        self.content = self.path.read_bytes()
        try:
            missing = set(SPECIAL) - set(self.content.decode().splitlines())
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

    def clean(self, text: str) -> str:
        """As `Tokenizer`."""
        return clean_text(text)

    def answer(self, text: str) -> str:
        """As `Tokenizer`."""
        return f"{text} [SEP]"

    def _rows(self, texts: Sequence[str], max_length: int) -> list[bytes]:
        split = [text.split(" ") for text in texts]
        known = self._known(split)
        begin, most = as_bytes([self.cls_id]), ID.itemsize * max_length
        return [b"".join([begin, *[known[word] for word in words]])[:most] for words in split]

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


class JsonTokenizer(Tokenizer):
    """The `tokenizer.json` of another encoder: texts in its published form, which ends with its end token.

    Where that has no token at the beginning, as SigLIP's, one is added. What the file lacks is taken from the
    tokenizer_config.json and config.json beside it, and is in the file that a checkpoint carries.
    """

    FILE = "tokenizer.json"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self.path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain exceptions
            raise UserError(f"{path} is not a tokenizer.json ({str(error)[:100]}): give another") from None
        self._tokenizer.no_truncation()
        published, model = (_read_json(self.path.with_name(f"{each}config.json")) for each in ("tokenizer_", ""))
        if "siglip" in f"{model.get('model_type')} {published.get('tokenizer_class')}".lower():
            self._lower()
        self._set_padding(published)
        self._set_ends(published)
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())
        self.mask_id = next(filter(None, map(self._tokenizer.token_to_id, ("[MASK]", "<mask>"))), NO_MASK)
        self.content = self._tokenizer.to_str().encode()
        self._tokenizer.no_padding()

    def _lower(self) -> None:
        """Texts in lower case, as SigLIP was trained; the files of SigLIP2 do not say so."""
        before = self._tokenizer.normalizer
        if before is None or "Lowercase" not in repr(before):
            self._tokenizer.normalizer = Normalizers([Lowercase(), *([before] if before else [])])

    def _set_padding(self, published: Mapping[str, Any]) -> None:
        token, known = _content(published.get("pad_token")), self._tokenizer.padding
        if token is None and known:
            token = known["pad_token"]
        names = [token] if token else ["[PAD]", "<pad>"]
        vocabulary = self._tokenizer.get_vocab()
        token = next((name for name in names if name in vocabulary), None)
        if token is None:
            raise UserError(f"{self.path} has no padding: give the folder with its tokenizer_config.json")
        self.pad_id = vocabulary[token]
        self._tokenizer.enable_padding(pad_id=self.pad_id, pad_token=token)

    def _set_ends(self, published: Mapping[str, Any]) -> None:
        """Set the ids at the beginning and the end of a text, and see to it that the file tells them."""
        ends = self._tokenizer.encode("").ids
        if "add_eos_token" in published:  # overrides the file
            named = [(f"add_{each}_token", _content(published.get(f"{each}_token"))) for each in ("bos", "eos")]
            vocabulary = self._tokenizer.get_vocab()
            ends = [vocabulary[token] for key, token in named if published.get(key) and token in vocabulary]
        if not ends:
            raise UserError(f"{self.path} ends texts with no token: give one of an encoder")
        begins = len(ends) > 1
        begin = self._tokenizer.token_to_id("<bos>")
        self.cls_id = ends[0] if begins else self.pad_id if begin is None else begin
        self.sep_id = ends[-1]
        names = {number: self._tokenizer.id_to_token(number) for number in ends}
        single = [*([names[ends[0]]] if begins else []), "$A", names[self.sep_id]]
        self._tokenizer.post_processor = TemplateProcessing(
            single=single, special_tokens=[(name, number) for number, name in names.items()]
        )

    def decode(self, ids: Sequence[int]) -> str:
        """As `Tokenizer`; CLIP marks the ends of words."""
        return super().decode(ids).replace("</w>", " ").strip()

    def _rows(self, texts: Sequence[str], max_length: int) -> list[bytes]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [as_bytes([self.cls_id, *each.ids[: max_length - 2], self.sep_id]) for each in encodings]


def as_bytes(ids: Sequence[int]) -> bytes:
    """Ids as bytes: one object in memory instead of one a number."""
    return np.array(ids, ID).tobytes()


def _content(token: Any) -> str | None:
    """The text of a special token in a tokenizer_config.json, where it may be an object."""
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    """The entries of a JSON file; empty where there is none."""
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy it again") from None


def find_vocabulary(path: Path) -> Path | None:
    """The vocabulary file that `path` is, or that it holds as a folder; None where there is none."""
    if path.is_dir():
        return next((path / name for name in VOCABULARIES if (path / name).is_file()), None)
    return path if path.is_file() else None


def hub_vocabulary(name: str) -> Path:
    """Local path of a hub tokenizer's vocabulary; raises FileNotFoundError saying what to set instead."""
    from huggingface_hub import snapshot_download  # unlike hf_hub_download it fails at once without a network

    try:
        with keep_alive(f"fetching {name}"):
            folder = Path(
                snapshot_download(name, allow_patterns=[*VOCABULARIES, "tokenizer_config.json", "config.json"])
            )
    except Exception as error:  # the hub client raises many kinds; all mean: not to be had
        raise MissingError(
            f"tokenizer={name} is not a local file or folder, and the download from the Hugging Face hub failed "
            f"({type(error).__name__}): check the name and the network, or set tokenizer=/path/to/vocab.txt"
        ) from None
    return find_vocabulary(folder) or folder / VOCABULARIES[0]
