"""The models as a Python program uses them: loaded from a run or the hub, embedding images, clips and texts."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download

from model.building import build_model
from model.card import model_card
from model.checkpoints.files import DESCRIPTION, TENSORS, Weights, find_vocabulary, write_weights
from model.checkpoints.loading import find_weights, fit_weights
from model.config import with_changes
from model.encoders import Encoders
from model.scoring import match_pairs
from model.singularity import Singularity as Network
from model.vqa import SingularityQA as QANetwork
from preprocessing.config import Preprocessing
from preprocessing.normalization import normalize
from preprocessing.text import VOCABULARIES, Tokenizer
from preprocessing.visuals import Clip, Picture, clip_pixels, image_pixels, is_clip
from runtime.errors import MissingError, UserError
from sharding.media.frames import MediaError

log = logging.getLogger(__name__)

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
TEXT_BATCH = 256

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pretrained(Encoders, ModelHubMixin):
    """A model with what its inputs need: its vocabulary, and the preprocessing of its training.

    Its methods take lists and keep their order; they run in evaluation mode, without gradients, on the device and in
    the precision that the model has. An input that cannot be used raises UserError, a ValueError that names its
    position: `images[3] does not exist: cat.jpg`.
    """

    tokenizer: Tokenizer | None = None
    preprocessing = Preprocessing()
    source: Path | None = None  # where the weights were found

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        source: str | Path,
        *,
        tokenizer: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Any:
        """The model of a run folder, a weights folder, an official .pth, or a repository of the Hugging Face hub.

        Of a run: its best checkpoint where it has one, otherwise its newest. In float32 on the CPU, in evaluation mode.
        Returns SingularityQA for weights with an answer decoder, else Singularity, whichever class it is called on.
        The weights' `plugins` are imported as in training, but never from the hub or from the folder of the weights.

        tokenizer: a vocab.txt or tokenizer.json, a folder that holds one, or a hub name, for weights without their own
        vocabulary: the published .pth files need "bert-base-uncased".
        revision, token, cache_dir, local_files_only: of the hub.
        Raises MissingError, a FileNotFoundError, if there is no such model; UserError if its files are damaged.
        """
        path = Path(source)
        if not path.exists() and HUB_NAME.fullmatch(str(source)):
            path = _fetch(str(source), revision, token, cache_dir, local_files_only)
        found, weights = find_weights(path)
        plugins = _trusted(weights.config.plugins, [path, found], path != Path(source))
        config = with_changes(weights.config, {"losses": {}, "plugins": plugins})
        vocabulary = find_vocabulary(found, config.text_encoder.vocab_size)
        name = tokenizer or vocabulary
        words = Tokenizer.load(str(name)) if name else None
        if words is not None and words.vocab_size > config.text_encoder.vocab_size:
            raise UserError(
                f"{name} has {words.vocab_size} entries, the model {config.text_encoder.vocab_size}: give the "
                "vocabulary that it was trained with, tokenizer=FILE"
            )
        special_ids = words.special_ids if words is not None else weights.special_ids
        model: Any = build_model(config, special_ids, (Singularity, SingularityQA))
        fit_weights(model, weights, str(source))
        model.tokenizer, model.preprocessing, model.source = words, weights.preprocessing, found
        model.history = weights.history
        return model.eval()

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write what `from_pretrained` reads: the vocabulary, model.safetensors, model.json."""
        if self.tokenizer is not None:
            self.tokenizer.save(save_directory)
        special_ids = {name: getattr(self, name) for name in ("pad_id", "cls_id", "mask_id")}
        weights = Weights(self.config, self.state_dict(), special_ids, self.preprocessing, self.history)
        write_weights(weights, save_directory)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card: that of the weights' folder where it has one, otherwise made of the run and its results."""
        written = None if self.source is None else self.source / "README.md"
        if written is not None and written.is_file():
            return ModelCard.load(written)
        return ModelCard(model_card(self.config, self.preprocessing, self.history, self.source))

    @contextmanager
    def _inference(self) -> Iterator[torch.device]:
        """Evaluation mode without gradients; gives the model's device."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield self.temporal_embeddings.device
        finally:
            self.train(training)

    def _tokens(
        self, texts: Sequence[str], what: str, length: int, form: Callable[[str], str] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask (M, Lt) of `form(text)`, by default cleaned, cut to the longest, on the model's device."""
        if self.tokenizer is None:
            raise UserError("the model has no vocabulary: from_pretrained(..., tokenizer='bert-base-uncased' or FILE)")
        _check_list(texts, what)
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"{what}[{number}] is of type {type(text).__name__}: must be a str")
            if not text.isascii() and re.search(r"[\ud800-\udfff]", text):
                raise UserError(f"{what}[{number}] is not Unicode: it has half of a surrogate pair")
        formed = list(map(form or self.tokenizer.clean, texts))
        ids, mask = self.tokenizer.encode(formed, min(length, self.config.text_encoder.max_positions))
        longest = max(1, int(mask.sum(1).max())) if len(texts) else 1
        device = self.temporal_embeddings.device
        return ids[:, :longest].to(device), mask[:, :longest].to(device)

    def _batches(
        self, items: Sequence[Any], what: str, read: Callable[[Any], np.ndarray], size: int
    ) -> Iterator[torch.Tensor]:
        """Normalised frames (B, T, 3, H, W) of `size` items at once, on the model's device."""
        _check_count(size, "batch_size")
        for first in range(0, len(items), size):
            chosen = range(first, min(first + size, len(items)))
            pixels = np.stack([_read(read, items[number], f"{what}[{number}]") for number in chosen])
            yield normalize(torch.from_numpy(pixels).to(self.temporal_embeddings.device), self.mean, self.std)

    def _visual_batches(
        self, visuals: Sequence[Picture | Clip], num_frames: int | None, size: int
    ) -> tuple[str, Iterator[torch.Tensor]]:
        """The medium of the visuals, which must be the same for all, and their `_batches`."""
        _check_list(visuals, "visuals")
        clips = [_read(is_clip, visual, f"visuals[{number}]") for number, visual in enumerate(visuals)]
        if len(set(clips)) > 1:
            number = clips.index(not clips[0])
            kinds = ["a clip" if each else "an image" for each in (clips[0], not clips[0])]
            raise UserError(f"visuals[0] is {kinds[0]}, visuals[{number}] {kinds[1]}: give images or clips, not both")
        medium = "video" if any(clips) else "image"
        read = self._read_clip(num_frames) if medium == "video" else self._read_image
        return medium, self._batches(visuals, "visuals", read, size)

    def _read_image(self, image: Picture) -> np.ndarray:
        return image_pixels(image, self.preprocessing, self.config.image_res)

    def _read_clip(self, num_frames: int | None) -> Callable[[Clip], np.ndarray]:
        frames = self.preprocessing.num_frames_test if num_frames is None else num_frames
        _check_count(frames, "num_frames")
        return partial(clip_pixels, settings=self.preprocessing, size=self.config.image_res, num_frames=frames)


class Singularity(Pretrained, Network):
    """The model of pre-training and retrieval: embeddings of images, clips and texts, and match scores of pairs.

    `model.singularity.Singularity` with its vocabulary and preprocessing; E is `config.embed_dim`.
    """

    def encode_images(self, images: Sequence[Picture], batch_size: int = 64) -> torch.Tensor:
        """Unit embeddings (N, E) float32 of images: PIL images, RGB arrays (H, W, 3) uint8, or paths of image files.

        A file that packing stored, or would store, gives the embedding that evaluation computes from the corpus.
        """
        _check_list(images, "images")
        return self._embeddings(self._batches(images, "images", self._read_image, batch_size))

    def encode_clips(self, clips: Sequence[Clip], num_frames: int | None = None, batch_size: int = 16) -> torch.Tensor:
        """Embeddings (N, E) float32 of clips: RGB arrays (T, H, W, 3) uint8, lists of T images, or paths of videos.

        num_frames of each are shown, by default as many as in the run's evaluation, chosen as there; their embeddings
        are unit vectors, of which this is the mean.
        """
        _check_list(clips, "clips")
        return self._embeddings(self._batches(clips, "clips", self._read_clip(num_frames), batch_size))

    def encode_texts(self, texts: Sequence[str], batch_size: int = TEXT_BATCH) -> torch.Tensor:
        """Unit embeddings (M, E) float32 of texts. The similarity of images and texts is `images @ texts.T`.

        Texts are cut at the longest `max_txt_l` of the run, of images or of clips.
        """
        return self._text_features(texts, max(self.preprocessing.max_txt_l.values()), batch_size)[2]

    def match(
        self,
        visuals: Sequence[Picture | Clip],
        texts: Sequence[str],
        num_frames: int | None = None,
        batch_size: int = 16,
    ) -> torch.Tensor:
        """Match logits (N, M) float32, on the CPU, of all pairs of N visuals and M texts; higher is a better match.

        Slower and more exact than embeddings: the cross-encoder reads each pair. The logits are those that evaluation
        re-ranks by. visuals: all images, or all clips, as `encode_images` and `encode_clips` take them.
        """
        medium, batches = self._visual_batches(visuals, num_frames, batch_size)
        attended, mask, _ = self._text_features(texts, self.preprocessing.max_txt_l[medium], TEXT_BATCH)
        scores = torch.zeros(len(visuals), len(texts))
        with self._inference():
            first = 0
            for frames in batches:
                block = np.arange(len(frames)), self.clip_tokens(frames)[0]
                pairs = np.ones((len(frames), len(texts)), dtype=bool)
                rows, columns, logits = match_pairs(self, [block], attended, mask, pairs)
                scores[first + rows, columns] = torch.from_numpy(logits)
                first += len(frames)
        return scores

    def _embeddings(self, batches: Iterator[torch.Tensor]) -> torch.Tensor:
        with self._inference() as device:
            parts = [self.project_visual(self.clip_tokens(frames)[1]).float().mean(1) for frames in batches]
        return torch.cat([torch.empty(0, self.config.embed_dim, device=device), *parts])

    def _text_features(
        self, texts: Sequence[str], length: int, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States (M, Lt, D) for `match_attended`, mask (M, Lt) and embeddings (M, E) of texts of `length` tokens."""
        _check_count(batch_size, "batch_size")
        ids, mask = self._tokens(texts, "texts", length)
        attended = [torch.empty(0, ids.shape[1], self.config.text_encoder.width, device=ids.device)]
        embeddings = [torch.empty(0, self.config.embed_dim, device=ids.device)]
        with self._inference():
            for rows in (slice(first, first + batch_size) for first in range(0, len(ids), batch_size)):
                states, pooled = self.encode_text(ids[rows], mask[rows])
                attended.append(self.text_encoder.attend_texts(states, mask[rows]))
                embeddings.append(self.project_text(pooled).float())
        return torch.cat(attended[1:] or attended), mask, torch.cat(embeddings)


class SingularityQA(Pretrained, QANetwork):
    """The model of question answering: `model.vqa.SingularityQA` with its vocabulary and preprocessing."""

    def answer(
        self,
        visuals: Sequence[Picture | Clip],
        questions: Sequence[str],
        answers: Sequence[str],
        num_frames: int | None = None,
        batch_size: int = 16,
        k_test: int = 128,
    ) -> list[tuple[str, float]]:
        """The most likely of `answers` to question i about visual i, and its probability, for N of both.

        visuals: all images, or all clips, as `Singularity.match` takes them. k_test: how many answers, those with the
        most likely first token, are compared as a whole, as in evaluation; the probability is among them.
        """
        _check_count(k_test, "k_test")
        if len(questions) != len(visuals):
            raise UserError(f"{len(questions)} questions for {len(visuals)} visuals: give one for each")
        if not answers:
            raise UserError("answers is empty: give the texts to choose from")
        medium, batches = self._visual_batches(visuals, num_frames, batch_size)
        ids, mask = self._tokens(questions, "questions", self.preprocessing.max_q_len)
        length = self.preprocessing.max_a_len[medium]
        form = None if self.tokenizer is None else self.tokenizer.answer
        answer_ids, answer_mask = self._tokens(answers, "answers", length, form)
        found: list[tuple[str, float]] = []
        with self._inference():
            for frames in batches:
                rows = slice(len(found), len(found) + len(frames))
                states = self.frame_states(self.clip_tokens(frames)[0], ids[rows], mask[rows])
                best, probability = self.rank_answers(states, mask[rows], answer_ids, answer_mask, k_test)
                found += [(answers[i], p) for i, p in zip(best[:, 0].tolist(), probability[:, 0].tolist(), strict=True)]
        return found


def _fetch(
    name: str, revision: str | None, token: str | bool | None, cache_dir: str | Path | None, offline: bool
) -> Path:
    """The local folder of a repository of the hub, fetched where it is not cached."""
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=offline,
                allow_patterns=[DESCRIPTION, TENSORS, *VOCABULARIES, "README.md"],
            )
        )
    except Exception as error:  # of many kinds: no network, no such name, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MissingError(
            f"{name} does not exist, and could not be fetched from the Hugging Face hub ({reason[:150]}): give a run, "
            "a weights folder, an official .pth, or the name of a repository, USER/NAME"
        ) from None


def _trusted(plugins: list[str], folders: list[Path], fetched: bool) -> list[str]:
    """Those of the weights' `plugins` that may be imported: none of fetched weights, and no file in their folders."""
    parents = {(folder if folder.is_dir() else folder.parent).resolve() for folder in folders}
    trusted = []
    for name in plugins:
        parts = name.replace(".", "/")
        files = [Path(place, f"{parts}{end}") for place in (".", *sys.path) for end in (".py", "/__init__.py")]
        found = [file.parent.resolve() for file in files if file.is_file()]
        if not fetched and not any(folder.is_relative_to(parent) for folder in found for parent in parents):
            trusted.append(name)
        elif name not in sys.modules:
            log.warning("plugins of foreign weights are not imported: import %s before, if the model needs it", name)
    return trusted


def _check_list(items: Any, what: str) -> None:
    if isinstance(items, str | Path) or not hasattr(items, "__len__"):
        raise UserError(f"{what} is of type {type(items).__name__}: give a list")


def _check_count(value: Any, name: str) -> None:
    if not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{name} is {value}: must be a whole number of at least 1")


def _read(read: Callable[[Item], Result], item: Item, name: str) -> Result:
    """`read(item)`; its errors begin with the item's name."""
    try:
        return read(item)
    except UserError as error:
        raise type(error)(f"{name} {error}") from None
    except (MediaError, OSError) as error:  # OSError: of Pillow, for an image that it opened and cannot decode
        raise UserError(f"{name} cannot be decoded: {error}") from None
