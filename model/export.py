"""`python -m model.export`: writes a model in the official form (.pth), or in ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import omegaconf
import torch

from model.checkpoint import load_weights
from model.config import ModelConfig
from model.files import OFFICIAL_SUFFIXES, Weights, write_weights, write_whole
from model.official import HEADS
from model.official_names import to_official
from model.vision import relative_position_index
from sharding.errors import command


def official_settings(config: ModelConfig) -> dict[str, Any]:
    """The run settings of an official checkpoint that describe the model; the heads, which no shape shows, are ours."""
    temporal, weights = config.temporal_vision_encoder, config.loss_weight
    return {
        "vit_type": config.vision_encoder.type,
        "temporal_vision_encoder": {
            "enable": temporal.enable,
            "num_layers": temporal.num_layers,
            "update_pooler_embed": temporal.update_pooler_embed,
        },
        "add_temporal_embed": config.add_temporal_embed,
        "image_res": config.image_res,
        "embed_dim": config.embed_dim,
        "video_input": {"num_frames": config.num_frames},
        "temp": config.temp,
        "mlm_prob": config.mlm_prob,
        "loss_weight": {"itc": weights.itc, "itm": weights.itm, "mlm": weights.mlm},
        "itm_hard_neg": config.itm_hard_neg,
        HEADS: {"vision": config.vision_encoder.heads, "text": config.text_encoder.heads},
    }


def official_state(weights: Weights) -> dict[str, torch.Tensor]:
    """All entries of an official checkpoint's state dict: tensors, tied copies and index tables."""
    config, words = weights.config, "word_head.bias" in weights.state
    prefix = "text_encoder.bert." if words else "text_encoder."
    result = to_official(weights.state, prefix)
    positions = torch.arange(config.text_encoder.max_positions)[None]
    result[prefix + "embeddings.position_ids"] = positions
    heads = [("text_encoder.", prefix)] if words else []
    if config.answer_decoder.enable:
        result["text_decoder.bert.embeddings.position_ids"] = positions
        heads.append(("text_decoder.", "text_decoder.bert."))
    for head, encoder in heads:
        result[head + "cls.predictions.decoder.weight"] = result[encoder + "embeddings.word_embeddings.weight"]
        result[head + "cls.predictions.decoder.bias"] = result[head + "cls.predictions.bias"]
    if config.vision_encoder.type == "beit":
        index = relative_position_index(config.image_res // config.vision_encoder.patch_size)
        for i in range(config.vision_encoder.depth):
            layer = f"vision_encoder.encoder.layer.{i}.attention.attention."
            result[layer + "relative_position_bias.relative_position_index"] = index
    return result


def write_official(weights: Weights, path: str | Path) -> None:
    """Write an official checkpoint (.pth) without optimiser state, whole or not at all."""
    path = Path(path)
    content = {
        "model": official_state(weights),
        "optimizer": {},
        "scheduler": {},
        "scaler": {},
        "config": omegaconf.OmegaConf.create(official_settings(weights.config)),
        "epoch": 0,
        "global_step": 0,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda aside: torch.save(content, aside))


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m model.export",
        description="Write a model, ours or official, to an official checkpoint (OUTPUT ends in .pth) or to a folder "
        "of ours (model.safetensors and model.json). All tensors are written bit for bit.",
    )
    parser.add_argument("model", help="a folder with model.json, a run folder (its best or newest), or a .pth")
    parser.add_argument("output", help="what to write: NAME.pth, or a folder")
    options = parser.parse_args(arguments)
    weights = load_weights(options.model)
    if Path(options.output).suffix in OFFICIAL_SUFFIXES:
        write_official(weights, options.output)
    else:
        write_weights(weights, options.output)
    sys.stdout.write(f"{options.output}: {len(weights.state)} tensors of {options.model}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
