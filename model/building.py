"""Builds the model that a configuration describes."""

from __future__ import annotations

import logging

import torch

from model.config import ModelConfig
from model.singularity import Singularity
from model.vqa import SingularityQA
from runtime.errors import MissingError
from runtime.plugins import load_plugins

log = logging.getLogger(__name__)

Model = Singularity | SingularityQA


def build_model(config: ModelConfig, special_ids: dict[str, int] | None = None) -> Model:
    """A model with random weights: `SingularityQA` where `answer_decoder.enable`, else `Singularity`.

    special_ids: pad_id, cls_id, mask_id of the vocabulary. Imports `config.plugins` first; one that cannot be found is
    logged, since the model may not need it. Raises UserError when sizes do not fit together, or when it needs one.
    """
    for plugin in config.plugins:
        try:
            load_plugins([plugin])
        except MissingError as error:
            log.warning("%s: continuing without it", error)
    kind = SingularityQA if config.answer_decoder.enable else Singularity
    return kind(config, **(special_ids or {}))


def tensor_names(config: ModelConfig) -> list[str]:
    """Names of all tensors of the model that `config` describes, without allocating any."""
    with torch.device("meta"):
        return list(build_model(config).state_dict())
