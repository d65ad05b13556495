"""Finds packed images or clips by text: dual encoder, then VTM; results as a table or a contact sheet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eval.cache import CachedBlocks
from eval.config import EvalConfig
from eval.features import collect_visuals, encode_texts, visual_blocks
from eval.metrics import top_items
from loaders.config import LoaderConfig, VideoInput
from loaders.evaluation import VisualSet
from model.checkpoints.files import resolve_weights
from model.checkpoints.loading import load_model
from model.scoring import joint_scores, match_pairs
from model.singularity import Singularity
from preprocessing.text import Tokenizer, find_vocabulary
from runtime.errors import UserError
from runtime.ranks import ALONE
from sharding.report.contact_sheet import Cell, contact_sheet, read_picture

log = logging.getLogger(__name__)

SHEET_WIDTH = 1240  # pixels, at most
CELL = 96  # of a frame on the sheet
FRAMES_SHOWN = 4
CANDIDATES = 32  # re-ranked


@dataclass(frozen=True)
class Found:
    """A hit: the visual's number and name, its match score, and its similarity by the dual encoder."""

    visual: int
    source: str
    match: float | None
    similarity: float


class VisualSearch:
    """A corpus' visuals, encoded once and kept on disk, and a model that finds them by text."""

    def __init__(
        self,
        checkpoint: str,
        corpus: str,
        cache: str | Path,
        num_frames: int = 4,
        tokenizer: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Encode what is not in `cache` yet; raises FileNotFoundError or ValueError for a bad checkpoint or corpus."""
        weights = resolve_weights(checkpoint)
        brings_own = weights.is_dir() and find_vocabulary(weights) is not None
        if not brings_own and tokenizer is None:
            raise UserError(f"{weights} has no vocabulary: give the one it was trained with, --tokenizer vocab.txt")
        self.tokenizer = Tokenizer.load(str(weights) if tokenizer is None else tokenizer)
        model = load_model(weights)
        if not isinstance(model, Singularity):
            raise UserError(f"{checkpoint} is a QA checkpoint without retrieval heads: use a retrieval model")
        self.model = model.to(device)
        video = VideoInput(num_frames_test=num_frames)
        self.dataset = VisualSet(corpus, LoaderConfig(image_res=model.config.image_res, video_input=video))
        self.config = EvalConfig(feature_cache=str(cache))
        with torch.inference_mode():
            blocks = visual_blocks(self.model, self.dataset, self.config, num_frames, ALONE)
            assert isinstance(blocks, CachedBlocks)
            self.visuals = collect_visuals(self.model, blocks, self.dataset.num_visuals, self.config)
        self._blocks = blocks
        self.frames_shown = FRAMES_SHOWN if self.dataset.media_type == "video" else 1

    def find(self, query: str, count: int = 12, candidates: int | None = None) -> list[Found]:
        """The `count` best visuals for a text: the most similar `candidates` ordered by the match score.

        candidates: 0 keeps the order of the dual encoder; by default CANDIDATES, or 0 where the validation of the
        weights found re-ranking no better. Raises ValueError for a query without words.
        """
        if candidates is None:
            candidates = CANDIDATES if self.model.history.prefers_reranking else 0
        text = self.tokenizer.clean(query).strip()
        if not text:
            raise UserError(f"the query {query!r} has no words: describe what to find")
        with torch.inference_mode():
            length = self.model.config.text_encoder.max_positions
            texts = encode_texts(self.model, *self.tokenizer.encode([text], length))
            similarity = (self.visuals.embeddings @ texts.embeddings[0]).cpu().numpy()
            similarity[~self.visuals.present] = -np.inf
            if not candidates:
                return [self._found(int(i), similarity, None) for i in top_items(similarity, count)]
            chosen = top_items(similarity, max(count, candidates))
            block = self._blocks.take(chosen.tolist())
            pairs = np.zeros((len(similarity), 1), dtype=bool)
            pairs[chosen] = True
            tokens = [(block.indices, block.tokens)]
            joint = self.model.history.joins_similarity
            visuals, _, scores = match_pairs(self.model, tokens, texts.attended, texts.mask, pairs, log_odds=joint)
            if joint:
                scores = joint_scores(self.model, similarity[visuals], scores)
        matched = np.full(len(similarity), -np.inf, dtype=np.float32)
        matched[visuals] = scores
        return [self._found(int(i), similarity, float(matched[i])) for i in top_items(matched, count)]

    def _found(self, visual: int, similarity: np.ndarray, match: float | None) -> Found:
        return Found(visual, self.dataset.sources[visual], match, float(similarity[visual]))

    def frames(self, visual: int) -> list[bytes]:
        """JPEG bytes of a visual's frames; empty where they cannot be read."""
        return self.dataset.thumbnail(visual, self.frames_shown)


def search_sheet(search: VisualSearch, query: str, hits: Sequence[Found]) -> Image.Image:
    """Contact sheet of the hits in order: the query above, below each hit its rank, score and name."""
    frames = search.frames_shown
    side = CELL if frames > 1 else 2 * CELL
    reranked = any(hit.match is not None for hit in hits)
    cells = [
        Cell(
            [read_picture(data) for data in search.frames(hit.visual)] or [None] * frames,
            label=f"{rank}  {hit.similarity if hit.match is None else hit.match:.3f}",
            name=hit.source,
        )
        for rank, hit in enumerate(hits, start=1)
    ]
    note = f"by {'match score' if reranked else 'similarity'}" if hits else ""
    return contact_sheet(cells, SHEET_WIDTH // (frames * side), side, title=f"“{query}”", note=note)


def hits_table(hits: Sequence[Found]) -> str:
    """The hits as a plain table."""
    lines = [f"{'rank':>4}  {'match':>8}  {'similarity':>10}  name"]
    for rank, hit in enumerate(hits, start=1):
        match = "-" if hit.match is None else f"{hit.match:.3f}"
        lines.append(f"{rank:>4}  {match:>8}  {hit.similarity:>10.3f}  {hit.source}")
    return "\n".join(lines)
