# ruff: noqa: E402, F401
"""Imports timm and transformers also where torchvision is a CUDA wheel and torch a CPU build.

Both libraries import torchvision, whose Python part registers fake kernels for two C++ operators. Where its extension
cannot be loaded, these operators do not exist and the import fails, so they are declared. The modules of this folder
import what they need of timm and transformers from here.
"""

from __future__ import annotations

from contextlib import suppress

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")  # the declarations live as long as this object
with suppress(ModuleNotFoundError):  # neither library needs it
    try:
        import torchvision
    except RuntimeError:
        if hasattr(torch.ops.torchvision, "nms"):  # the extension is loaded: another error
            raise
        _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import transformers
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
