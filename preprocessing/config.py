"""How pictures, clips and texts become a model's inputs; recorded with its weights, so that Python repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class TrainingCorpus:
    """A corpus that a model was trained on: its counts, and the settings that packing stored its media with.

    size: shorter side in pixels, 0 where media were not packed here and are read as they are.
    """

    name: str
    media_type: str
    samples: int = 0
    captions: int = 0
    questions: int = 0
    size: int = 0
    quality: int = 90
    fps: float = 2.0
    max_frames: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainingCorpus:
        """From plain values; unknown ones are left out."""
        return cls(**_known(cls, values))


@dataclass(frozen=True)
class Preprocessing:
    """The settings of a run that decide a model's inputs in evaluation, by their names in its YAML, and its corpora."""

    antialias: bool = False
    max_txt_l: Mapping[str, int] = field(default_factory=lambda: {"image": 32, "video": 32})
    max_q_len: int = 25
    max_a_len: Mapping[str, int] = field(default_factory=lambda: {"image": 6, "video": 5})
    num_frames_test: int = 4
    sample_type_test: str = "middle"
    corpora: tuple[TrainingCorpus, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Preprocessing:
        """From plain values, those of model.json or of a run's YAML; unknown ones are left out."""
        corpora = tuple(TrainingCorpus.of(each) for each in values.get("corpora", ()))
        return cls(**{**_known(cls, values), **_known(cls, values.get("video_input", {})), "corpora": corpora})

    def packing(self, media_type: str, image_res: int) -> TrainingCorpus:
        """The training corpus that media of this type are packed like; without one, at the model's own size."""
        same = [corpus for corpus in self.corpora if corpus.media_type == media_type]
        return same[0] if same else TrainingCorpus("", media_type, size=image_res)


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {item.name: values[item.name] for item in fields(kind) if item.name in values}
