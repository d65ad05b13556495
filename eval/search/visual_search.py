"""Finds packed images or clips by a text: dual encoder, then matching; results as a table or a contact sheet."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from eval.cache import CachedBlocks
from eval.config import EvalConfig
from eval.features import collect_visuals, encode_texts, visual_blocks
from eval.ranking import top_items
from eval.report.gallery import strip
from loaders.config import LoaderConfig, VideoInput
from loaders.evaluation import VisualSet
from loaders.text import Tokenizer, clean_text
from model.checkpoints.loading import load_model, resolve_weights
from model.scoring import match_pairs
from model.singularity import Singularity
from runtime.errors import AccessError, UserError
from runtime.ranks import ALONE

log = logging.getLogger(__name__)

SHEET_WIDTH, MARGIN, TITLE, LINE = 1240, 16, 44, 17  # pixels
TEXT = 2 * LINE + 7  # below a picture
CELL = 96  # of a frame on the sheet
FRAMES_SHOWN = 4


@dataclass(frozen=True)
class Found:
    """A hit: the visual's number and name, its match score, and its similarity by the dual encoder."""

    visual: int
    source: str
    match: float | None
    similarity: float

    @property
    def order(self) -> str:
        """What hits are ordered by: match scores, or similarity where nothing was matched."""
        return "similarity" if self.match is None else "match score"

    @property
    def deciding(self) -> float:
        """The score that hits are ordered by."""
        return self.similarity if self.match is None else self.match


class VisualSearch:
    """A corpus' visuals, encoded once and kept on disk, and a model that finds them by a text."""

    def __init__(
        self,
        checkpoint: str,
        corpus: str,
        cache: str | Path,
        num_frames: int = 4,
        tokenizer: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Encode what is not in `cache` yet. Raises FileNotFoundError or ValueError naming what is wrong."""
        weights = resolve_weights(checkpoint)
        brings_own = weights.is_dir() and (weights / "vocab.txt").is_file()
        if not brings_own and tokenizer is None:
            raise UserError(f"{weights} brings no vocabulary: give the one it was trained with, --tokenizer vocab.txt")
        self.tokenizer = Tokenizer.load(str(weights) if tokenizer is None else tokenizer)
        model = load_model(weights)
        if not isinstance(model, Singularity):
            raise UserError(f"{checkpoint} answers questions and cannot search: give a model for retrieval")
        self.model = model.to(device)
        video = VideoInput(num_frames_test=num_frames)
        self.dataset = VisualSet(corpus, LoaderConfig(image_res=model.config.image_res, video_input=video))
        self.config = EvalConfig(feature_cache=str(cache))
        with torch.inference_mode():
            blocks = visual_blocks(self.model, self.dataset, self.config, num_frames, ALONE, device)
            assert isinstance(blocks, CachedBlocks)
            self.visuals = collect_visuals(self.model, blocks, self.dataset.num_visuals, self.config)
        self._blocks = blocks
        self._busy = threading.Lock()  # a web page asks from several threads

    def find(self, query: str, count: int = 12, candidates: int = 32) -> list[Found]:
        """The `count` best visuals for a text: the most similar `candidates` ordered by the match score.

        candidates: 0 leaves the order to the dual encoder. Raises ValueError for a query without words.
        """
        text = clean_text(query)
        if not text:
            raise UserError(f"the query {query!r} has no words: describe what is to be seen")
        with self._busy, torch.inference_mode():
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
            visuals, _, scores = match_pairs(self.model, tokens, texts.attended, texts.mask, pairs)
        matched = np.full(len(similarity), -np.inf, dtype=np.float32)
        matched[visuals] = scores
        return [self._found(int(i), similarity, float(matched[i])) for i in top_items(matched, count)]

    def _found(self, visual: int, similarity: np.ndarray, match: float | None) -> Found:
        return Found(visual, self.dataset.sources[visual], match, float(similarity[visual]))

    def picture(self, visual: int) -> tuple[bytes, int]:
        """A visual's frames side by side as JPEG, and how many they are; raises OSError where they cannot be read."""
        with self._busy:
            frames = self.dataset.thumbnail(visual, FRAMES_SHOWN if self.dataset.media_type == "video" else 1)
        if not frames:
            raise AccessError(f"{self.dataset.sources[visual]} cannot be read")
        return strip(frames), len(frames)


def contact_sheet(search: VisualSearch, query: str, hits: Sequence[Found]) -> bytes:
    """JPEG of the hits in order, the query above them, and below each its rank, the score that orders it, its name."""
    frames = FRAMES_SHOWN if search.dataset.media_type == "video" else 1
    width = CELL * frames if frames > 1 else 2 * CELL
    height = CELL if frames > 1 else 2 * CELL
    columns = max(1, (SHEET_WIDTH - MARGIN) // (width + MARGIN))
    rows = -(-len(hits) // columns)
    sheet = Image.new("RGB", (SHEET_WIDTH, TITLE + MARGIN + rows * (height + TEXT + MARGIN)), "#f6f6f4")
    pen, large, small = ImageDraw.Draw(sheet), ImageFont.load_default(22), ImageFont.load_default(13)
    pen.text((MARGIN, MARGIN), f"“{query}”", fill="#1c1d21", font=large)
    if hits:
        pen.text((SHEET_WIDTH - MARGIN, MARGIN + 6), f"by {hits[0].order}", fill="#6c6f78", font=small, anchor="ra")
    names = short_names([hit.source for hit in hits], lambda name: pen.textlength(name, font=small) <= width)
    for place, hit in enumerate(hits):
        left = MARGIN + place % columns * (width + MARGIN)
        top = TITLE + MARGIN + place // columns * (height + TEXT + MARGIN)
        try:
            with Image.open(io.BytesIO(search.picture(hit.visual)[0])) as picture:
                sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        except OSError:
            pen.rectangle((left, top, left + width, top + height), fill="#eceae6")
            pen.text((left + 8, top + 8), "not readable", fill="#6c6f78", font=small)
        pen.text((left, top + height + 4), f"{place + 1}  {hit.deciding:.3f}", fill="#6c6f78", font=small)
        pen.text((left, top + height + 4 + LINE), names[place], fill="#1c1d21", font=small)
    out = io.BytesIO()
    sheet.save(out, "JPEG", quality=88)
    return out.getvalue()


def short_names(names: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    """Names cut until they fit, at an end or in the middle, so that different ones stay different."""
    differ = next((i for i, letters in enumerate(zip(*names)) if len(set(letters)) > 1), 0)
    ways: list[Callable[[str, int], str]] = [
        lambda name, kept: f"…{name[-kept:]}",
        lambda name, kept: f"{name[:kept]}…",
        lambda name, kept: f"{name[: kept // 2]}…{name[-(kept - kept // 2) :]}",
        lambda name, kept: f"…{name[differ : differ + kept]}…",
    ]
    shortened = list(names)
    for way in ways:
        shortened = [name if fits(name) else _longest(name, way, fits) for name in names]
        if len(set(shortened)) == len(set(names)):
            break
    return shortened


def _longest(name: str, way: Callable[[str, int], str], fits: Callable[[str], bool]) -> str:
    return next((text for kept in range(len(name) - 1, 0, -1) if fits(text := way(name, kept))), "…")


def hits_table(hits: Sequence[Found]) -> str:
    """The hits as a plain table."""
    lines = [f"{'rank':>4}  {'match':>8}  {'similarity':>10}  name"]
    for place, hit in enumerate(hits, start=1):
        match = "-" if hit.match is None else f"{hit.match:.3f}"
        lines.append(f"{place:>4}  {match:>8}  {hit.similarity:>10.3f}  {hit.source}")
    return "\n".join(lines)
