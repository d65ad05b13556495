"""Token ids of the questions in a parity case, which records their text only."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer

from runtime.errors import MissingError


def clean(question: str) -> str:
    """A question as the official code hands it to its tokenizer."""
    question = re.sub(r"[,.'!?\"()*#:;~]", "", question.lower())
    question = question.replace("-", " ").replace("/", " ").replace("<person>", "person")
    return re.sub(r"\s{2,}", " ", question).rstrip("\n").strip(" ")


def tokenise(questions: list[str], vocabulary: Path, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, length) int64: [CLS] and word pieces, no [SEP]. Raises FileNotFoundError without vocabulary."""
    if not vocabulary.is_file():
        raise MissingError(f"{vocabulary} is missing: the cases of a folder share a vocab.txt")
    tokenizer = BertWordPieceTokenizer(str(vocabulary), lowercase=True)
    start, padding = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[PAD]")
    rows = [
        [start, *tokenizer.encode(clean(question), add_special_tokens=False).ids][:length] for question in questions
    ]
    ids = torch.tensor([row + [padding] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask
