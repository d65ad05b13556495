# ruff: noqa: E402, F401
"""Imports timm and transformers also where torchvision is a CUDA wheel and torch a CPU build.

Both libraries import torchvision, whose Python part registers fake kernels for two C++ operators. Without its
extension these operators do not exist and the import fails, so they are declared first. The modules of this folder
import what they need of timm and transformers from here.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _extension_loads() -> bool:
    """Whether torchvision's C++ extension exists and can be loaded into this process."""
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return True  # nothing to repair
    folder = Path(package.origin).parent
    for suffix in [*importlib.machinery.EXTENSION_SUFFIXES, ".so"]:
        library = folder / f"_C{suffix}"
        if library.exists():
            try:
                torch.ops.load_library(str(library))
            except OSError:
                return False
            return True
    return False


def declare_missing_operators() -> None:
    """Declare the operators that torchvision expects of its extension, when the extension cannot be loaded."""
    if "torchvision" in sys.modules or hasattr(torch.ops.torchvision, "nms") or _extension_loads():
        return
    global _library  # the declarations live as long as this object
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS.values():
        _library.define(schema)


_library: torch.library.Library | None = None
declare_missing_operators()

from timm.layers import resample_abs_pos_embed
from timm.models import create_model, get_pretrained_cfg, is_model
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit, gen_relative_position_index
from timm.models.vision_transformer import VisionTransformer
from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertIntermediate,
    BertLayer,
    BertOutput,
    BertPredictionHeadTransform,
    BertSelfOutput,
)
