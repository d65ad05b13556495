"""Where a model's weights come from, and how its validation ranked; recorded with the weights, in model.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from model.config import ModelConfig


@dataclass(frozen=True)
class History:
    """What the training of the weights started from, and what is known of their VTM head.

    started_from: the weights that it started from, then what those started from, and so on, as far as recorded.
    matching_trained: whether a loss trained the head, as far as recorded. reranks: whether re-ranking by it was better
    than the dual encoder alone on the validation split (`stop_key`); None if not recorded. rerank_score: of the
    training's evaluations, itm or itm+itc.
    """

    started_from: tuple[str, ...] = ()
    matching_trained: bool = True
    reranks: bool | None = None
    rerank_score: str = "itm"

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> History:
        """From the plain values of model.json; unknown ones are left out."""
        known = {item.name: values[item.name] for item in fields(cls) if item.name in values}
        return cls(**{**known, "started_from": tuple(values.get("started_from", ()))})

    @classmethod
    def of_training(cls, config: ModelConfig, source: str | None = None, earlier: History | None = None) -> History:
        """That of a new training, from the weights at `source`, whose history is `earlier`, or from initial weights."""
        if source is not None:
            started_from = (source, *(earlier or History()).started_from)
        else:
            names = {"vision": config.vision_encoder.pretrained, "text": config.text_encoder.pretrained}
            given = [f"{part}_encoder.pretrained={name}" for part, name in names.items() if name]
            started_from = (", ".join(given) or "random weights",)
        return cls(started_from, config.loss_weight.itm > 0 or bool(config.own_losses))

    @property
    def joins_similarity(self) -> bool:
        """Whether re-ranking adds the dual encoder's similarity, `model.scoring.joint_scores`."""
        return self.rerank_score == "itm+itc"

    @property
    def prefers_reranking(self) -> bool:
        """Whether to re-rank by default: not where the validation found it no better, nor where no loss trained it."""
        return self.matching_trained and self.reranks is not False

    @property
    def origin(self) -> str:
        """`started_from` in words; empty where it is not recorded."""
        return ", which started from ".join(self.started_from)
