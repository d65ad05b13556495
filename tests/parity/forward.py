"""Parity of forward pass, losses and gradients (cases 01 to 03)."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from model.checkpoints.official_names import to_official
from model.losses import contrastive_loss, contrastive_targets, matching_loss, mlm_loss, negative_weights, same_visual
from model.singularity import TEMPERATURE_RANGE, RandomChoices, Singularity
from tests.parity.comparison import LOSS_NAMES, Case, Comparison

Values = dict[str, torch.Tensor]


def record(values: Values, name: str, module: nn.Module, batch: int | None = None, inputs: bool = False) -> Any:
    """Record the first output of `module`, or its first input, in `values`; a context that removes the hook.

    batch: keep this many rows.
    """

    def hook(_: nn.Module, arguments: Any, output: Any) -> None:
        states = arguments if inputs else output
        first = states[0] if isinstance(states, tuple) else states
        values.setdefault(name, first.detach()[:batch])

    return module.register_forward_hook(hook)


def _record_layers(model: Singularity, batch: int, values: Values) -> ExitStack:
    """Record what `expected.npz` calls vision_layer_*, text_layer_* and itm_cls_embeds."""
    hooks, text = ExitStack(), model.text_encoder
    blocks = list(model.vision_encoder.transformer.blocks)
    hooks.enter_context(record(values, "vision_layer_00_input", blocks[0], inputs=True))
    for i, block in enumerate(blocks):
        hooks.enter_context(record(values, f"vision_layer_{i:02d}_output", block))
    hooks.enter_context(record(values, "text_layer_00_input", text.embeddings, batch))
    for i, layer in enumerate(text.layer[: text.fusion_layer]):
        hooks.enter_context(record(values, f"text_layer_{i:02d}_output", layer, batch))
    hooks.enter_context(record(values, "itm_cls_embeds", model.itm_head, inputs=True))
    return hooks


def _fused(model: Singularity, inputs: Values, states: torch.Tensor, tokens: torch.Tensor) -> Values:
    """All tokens of the 3B pairs after each fusion layer, in the official order, and the MLM logits.

    A training step computes only those of them that its losses need.
    """
    values: Values = {}
    first = model.text_encoder.fusion_layer
    keys, mask, own = model.visual_keys(tokens), inputs["attention_mask"], torch.arange(len(states))
    texts = inputs["itm_text_neg_idx"]
    index = torch.cat([own, inputs["itm_image_neg_idx"], own])
    masks = torch.cat([mask, mask, mask[texts]])
    with ExitStack() as hooks:
        for i, layer in enumerate(model.text_encoder.layer[first:], first):
            hooks.enter_context(record(values, f"fusion_layer_{i:02d}_output", layer))
        fused = model.text_encoder.fuse(torch.cat([states, states, states[texts]]), masks, keys, index)
    values["itm_logits"] = model.itm_head(fused[:, 0])
    if model.word_head is not None:
        masked = model.text_encoder.fuse(model.text_encoder(inputs["mlm_input_ids"], mask), mask, keys)
        values["mlm_logits"] = model.word_head(masked, model.text_encoder.word_matrix())
        values["loss_mlm"] = mlm_loss(values["mlm_logits"], inputs["mlm_labels"])
    return values


def recorded_choices(inputs: Values, prefix: str = "") -> RandomChoices:
    """The recorded random choices."""
    names = ("itm_image_neg_idx", "itm_text_neg_idx", "mlm_input_ids", "mlm_labels")
    return RandomChoices(*(inputs.get(prefix + name) for name in names))


def _values(model: Singularity, inputs: Values) -> Values:
    """Everything between the encoders and the losses, under the recorded names."""
    batch = len(inputs["idx"])
    tokens, pooled = model.encode_visual(inputs["image"])
    states, pooled_text = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
    similarity = model.similarity(pooled, pooled_text) / model.temp.clamp(*TEMPERATURE_RANGE)
    same = same_visual(inputs["idx"])
    targets = contrastive_targets(inputs["idx"])
    has_negative = torch.ones(batch, dtype=torch.bool)
    fused = _fused(model, inputs, states, tokens)
    values = {
        "image_embeds": tokens,
        "pooled_image_embeds": pooled,
        "text_embeds": states,
        "pooled_text_embeds": pooled_text,
        "image_feat": model.project_visual(pooled),
        "text_feat": model.project_text(pooled_text),
        "sim_i2t": similarity,
        "sim_t2i": similarity.T,
        "sim_targets": targets,
        "itm_weights_i2t": negative_weights(similarity, same, hard=True),
        "itm_weights_t2i": negative_weights(similarity.T, same, hard=True),
        "loss_ita": contrastive_loss(similarity, similarity.T, targets),
        "loss_itm": matching_loss(fused["itm_logits"], has_negative),
    }
    for name, frames in inputs.items():
        if name.startswith("image_T"):
            suffix = name.removeprefix("image")
            values[f"image_embeds{suffix}"], values[f"pooled_image_embeds{suffix}"] = model.encode_visual(frames)
    return values | fused


def compare_forward(folder: Path) -> Comparison:
    """Outputs of every stage, losses and gradients of the pre-training or retrieval model of a case."""
    case, result = Case(folder), Comparison(folder.name)
    model = case.load()
    assert isinstance(model, Singularity)
    inputs, expected = case.inputs, case.expected
    batch, values = len(inputs["idx"]), Values()
    with _record_layers(model, batch, values):
        arguments = [inputs[name] for name in ("image", "input_ids", "attention_mask", "idx")]
        losses = model(*arguments, recorded_choices(inputs))
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    with torch.no_grad():
        values = values | _values(model, inputs)
    true, texts, visuals = values["itm_cls_embeds"].split(batch)  # the official order is another one
    values["itm_cls_embeds"] = torch.cat([true, visuals, texts])
    values |= {"loss_total": total, "temp_after_clamp": model.temp.squeeze()}
    values |= {
        f"weighted_loss_{name}": losses[f"loss_{ours}"] for name, ours in LOSS_NAMES.items() if f"loss_{ours}" in losses
    }
    lowest = bool(torch.isclose(expected["temp_after_clamp"], torch.tensor(TEMPERATURE_RANGE[0])))
    for name, recorded in expected.items():
        if name.startswith("itm_weights") and not model.config.itm_hard_neg:
            continue
        if name not in values:
            result.equal(f"{name} (nothing to compare with)", False, True)
        elif "loss" in name:
            result.loss(name, values[name], recorded, relative=lowest)
        else:
            result.close(name, values[name], recorded)
    compare_gradients(model, folder / "grads.npz", result)
    return result


def compare_gradients(model: nn.Module, path: Path, result: Comparison) -> None:
    """The gradients in `model` with recorded ones, by official name; those of key biases are noise and are skipped."""
    if not path.is_file():
        return
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    prefix = "text_encoder.bert." if "word_head.bias" in gradients else "text_encoder."
    ours = to_official(gradients, prefix)
    with np.load(path) as recorded:
        names = [str(name) for name in recorded["names"]]
        result.equal("names of parameters with a gradient", sorted(ours), sorted(names))
        for i, name in enumerate(names):
            if name.endswith("key.bias") or name not in ours:
                continue
            norm = float(recorded["l2"][i])
            result.gradient(f"l2 of the gradient of {name}", ours[name].double().norm(), norm, scale=norm)
            if f"grad:{name}" in recorded.files:
                result.gradient(f"gradient of {name}", ours[name], recorded[f"grad:{name}"])
