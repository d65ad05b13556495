"""Builds the model that a configuration describes."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from model.config import ModelConfig
from model.singularity import Singularity
from model.vqa import SingularityQA
from runtime.plugins import NoModuleError, load_plugins

log = logging.getLogger(__name__)

Model = Singularity | SingularityQA


def build_model(
    config: ModelConfig,
    special_ids: dict[str, int] | None = None,
    kinds: tuple[type[Singularity], type[SingularityQA]] = (Singularity, SingularityQA),
) -> Model:
    """A model with random weights: `SingularityQA` where `answer_decoder.enable`, else `Singularity`.

    special_ids: pad_id, cls_id, mask_id of the vocabulary. kinds: classes to take instead of these. Imports
    `config.plugins` first; one that cannot be found, or lacks another module, is logged: the model may not need it.
    Raises UserError when sizes do not fit together, or when it needs one.
    """
    for plugin in config.plugins:
        try:
            load_plugins([plugin])
        except (NoModuleError, ModuleNotFoundError) as error:
            log.warning("%s: continuing without plugin %s", error, plugin)
    kind = kinds[config.answer_decoder.enable]
    return kind(config, **(special_ids or {}))


def tensor_names(config: ModelConfig) -> list[str]:
    """Names of all tensors of the model that `config` describes, of built-in parts, without allocating any."""
    with torch.device("meta"):
        return list(build_model(replace(config, plugins=[])).state_dict())
