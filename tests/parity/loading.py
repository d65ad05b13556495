"""Parity of loading weights: into fine-tuning models (cases 04, 06c), and from hub weights (case 10)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.checkpoints.files import Weights
from model.checkpoints.loading import load_model
from model.checkpoints.official import read_official_file
from model.checkpoints.pretrained import new_model
from model.config import AnswerDecoderConfig, LossWeights, ModelConfig, TextConfig, VisionConfig
from model.export import official_state
from runtime.settings import read_yaml
from tests.parity.comparison import Case, Comparison

_REBUILT = ("relative_position_index", "position_ids")


def _target_changes(folder: Path) -> dict[str, Any]:
    """Settings of the model that the checkpoint of a case is loaded into."""
    target = read_yaml(folder / "config_target.yaml")
    changes = {
        "image_res": target["image_res"],
        "num_frames": target["video_input"]["num_frames"],
        "add_temporal_embed": target["add_temporal_embed"],
    }
    for name in ("enable", "num_layers", "update_pooler_embed"):
        changes[f"temporal_vision_encoder.{name}"] = target["temporal_vision_encoder"][name]
    if "text_decoder" in target:
        return changes | {"answer_decoder.enable": True}
    return changes | {"loss_weight.mlm": 0.0}


def _as_official(model: torch.nn.Module, config: ModelConfig) -> dict[str, torch.Tensor]:
    return official_state(Weights(config, model.state_dict()))


def compare_finetuning_start(folder: Path) -> Comparison:
    """A pre-training checkpoint in a fine-tuning model: where each tensor comes from, what is resized, the outputs."""
    case, result = Case(folder), Comparison(folder.name)
    recorded = case.json("expected.json")["finetune"]
    source = read_official_file(case.checkpoint)["model"]
    changes = _target_changes(folder)
    model = load_model(case.checkpoint, changes)
    ours = _as_official(model, model.config)
    result.equal("names of the tensors", sorted(ours), sorted(recorded["shapes"]))
    for name, shape in recorded["shapes"].items():
        result.equal(f"shape of {name}", list(ours[name].shape), shape)
    for name, origin in recorded["mapping"].items():
        if origin is not None and name not in recorded["transformed"] and not name.endswith(_REBUILT):
            result.equal(f"{name} from {origin}", ours[name], source[origin])
    _compare_states(case, result, "state:", ours)
    with torch.no_grad():
        tokens, pooled = model.encode_visual(case.inputs["image"])
    for name, value in (("image_embeds", tokens), ("pooled_image_embeds", pooled)):
        if name in case.expected:
            result.close(name, value, case.expected[name])
    # The second stage of pre-training: the same sizes, with the MLM head.
    second = {key: value for key, value in changes.items() if not key.startswith(("loss_weight", "answer_decoder"))}
    stage = load_model(case.checkpoint, second)
    _compare_states(case, result, "stage2_state:", _as_official(stage, stage.config))
    return result


def _compare_states(case: Case, result: Comparison, prefix: str, ours: dict[str, torch.Tensor]) -> None:
    for name, value in case.expected.items():
        if name.startswith(prefix):
            result.close(name, ours[name.removeprefix(prefix)], value)


def _hub_config(case: Case, kind: str) -> ModelConfig:
    """The model of a hub case: sizes from its JSON files, weights from its folders."""
    folder, settings = case.folder, read_yaml(case.folder / "config.yaml")
    vision, text = case.json("vision_config.json"), case.json("bert_config.json")
    return ModelConfig(
        vision_encoder=VisionConfig(
            type=settings["vit_type"],
            pretrained=str(folder / case.json("case.json")["vit_dir"]),
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            depth=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp_ratio=vision["intermediate_size"] / vision["hidden_size"],
            layer_norm_eps=vision["layer_norm_eps"],
        ),
        text_encoder=TextConfig(
            pretrained=str(folder / "hf_bert"),
            vocab_size=text["vocab_size"],
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            fusion_layer=text["fusion_layer"],
            heads=text["num_attention_heads"],
            intermediate=text["intermediate_size"],
            max_positions=text["max_position_embeddings"],
            layer_norm_eps=text["layer_norm_eps"],
        ),
        answer_decoder=AnswerDecoderConfig(enable=kind == "vqa"),
        image_res=settings["image_res"],
        num_frames=settings["video_input"]["num_frames"],
        embed_dim=settings["embed_dim"],
        temp=settings["temp"],
        loss_weight=LossWeights(mlm=1.0 if kind == "pretrain" else 0.0),
    )


def compare_hub_start(folder: Path) -> Comparison:
    """Models that start from Hugging Face folders: where each tensor comes from, and the vision encoder's outputs."""
    case, result = Case(folder), Comparison(folder.name)
    recorded = case.json("expected.json")
    sources = {
        each.name: torch.load(each / "pytorch_model.bin", map_location="cpu", weights_only=True)
        for each in folder.glob("hf_*")
    }
    for kind in ("pretrain", "retrieval", "vqa"):
        config = _hub_config(case, kind)
        model = new_model(config).eval()
        ours = _as_official(model, config)
        result.equal(f"{kind}: names of the tensors", sorted(ours), sorted(recorded[kind]))
        for name, origin in recorded[kind].items():
            if origin is not None:
                place, key = origin.split(":")
                result.equal(f"{kind}: {name} from {origin}", ours[name], sources[place][key])
        _compare_states(case, result, "state:", {name: ours[name] for name in ours})
        _compare_fresh(result, kind, ours, recorded["fresh_init_stats"].get(kind, {}))
        if kind == "retrieval":
            with torch.no_grad():
                raw = model.vision_encoder.transformer.forward_features(case.inputs["image"])
                pooled = model.vision_encoder.transformer.forward_head(raw, pre_logits=True)
            result.close("vision_last_hidden_state", raw, case.expected["vision_last_hidden_state"])
            if "vision_pooler_output" in case.expected and config.vision_encoder.type == "beit":
                result.close("vision_pooler_output", pooled, case.expected["vision_pooler_output"])
    return result


def _compare_fresh(
    result: Comparison, kind: str, ours: dict[str, torch.Tensor], recorded: dict[str, dict[str, float]]
) -> None:
    """Newly initialised tensors: constants exactly, standard deviations within the sampling error of their size."""
    for name, statistics in recorded.items():
        size = statistics["numel"]
        if name.endswith(_REBUILT) or name not in ours:
            continue
        if (statistics["std"] == 0 and size > 1) or name == "temp":
            result.close(f"{kind}: fresh {name}", ours[name].mean(), statistics["mean"])
        elif size >= 256:
            spread = float(ours[name].std()) / statistics["std"]
            result.equal(f"{kind}: spread of fresh {name} as recorded", abs(spread - 1) < 8 / size**0.5, True)
