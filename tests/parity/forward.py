"""Parity of forward pass, losses and gradients (cases 01 to 03)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from model.checkpoints.official_names import to_official
from model.losses import contrastive_loss, contrastive_targets, matching_loss, mlm_loss, negative_weights, same_visual
from model.singularity import TEMPERATURE_RANGE, RandomChoices, Singularity
from tests.parity.comparison import LOSS_NAMES, Case, Comparison


class Recorder:
    """Records inputs and outputs of chosen modules by hooks."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []

    def watch(self, name: str, module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Record the first output of `module` under `name`, after `change`."""

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            self.values.setdefault(name, change(first.detach()))

        self._handles.append(module.register_forward_hook(hook))

    def watch_input(self, name: str, module: nn.Module) -> None:
        """Record the first input of `module` under `name`."""

        def hook(_: nn.Module, args: Any) -> None:
            self.values.setdefault(name, args[0].detach())

        self._handles.append(module.register_forward_pre_hook(hook))

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _watch_layers(model: Singularity, recorder: Recorder, batch: int) -> None:
    """Record what `expected.npz` calls vision_layer_*, text_layer_* and fusion_layer_*."""
    blocks = list(model.vision_encoder.transformer.blocks)
    recorder.watch_input("vision_layer_00_input", blocks[0])
    for i, block in enumerate(blocks):
        recorder.watch(f"vision_layer_{i:02d}_output", block, lambda states: states)
    recorder.watch("text_layer_00_input", model.text_encoder.embeddings, lambda states: states[:batch])
    for i, layer in enumerate(model.text_encoder.layer[: model.text_encoder.fusion_layer]):
        recorder.watch(f"text_layer_{i:02d}_output", layer, lambda states: states[:batch])
    recorder.watch_input("itm_cls_embeds", model.itm_head)


def _fused(
    model: Singularity, inputs: dict[str, torch.Tensor], states: torch.Tensor, tokens: torch.Tensor
) -> dict[str, torch.Tensor]:
    """All tokens of the 3B pairs after each fusion layer, in the official order, and the MLM logits.

    A training step computes only those of them that its losses need.
    """
    recorder, first = Recorder(), model.text_encoder.fusion_layer
    for i, layer in enumerate(model.text_encoder.layer[first:], first):
        recorder.watch(f"fusion_layer_{i:02d}_output", layer, lambda states: states)
    keys, mask, own = model.visual_keys(tokens), inputs["attention_mask"], torch.arange(len(states))
    texts = inputs["itm_text_neg_idx"]
    index = torch.cat([own, inputs["itm_image_neg_idx"], own])
    masks = torch.cat([mask, mask, mask[texts]])
    fused = model.text_encoder.fuse(torch.cat([states, states, states[texts]]), masks, keys, index)
    recorder.stop()
    values = recorder.values | {"itm_logits": model.itm_head(fused[:, 0])}
    if model.word_head is not None:
        masked = model.text_encoder.fuse(model.text_encoder.encode(inputs["mlm_input_ids"], mask), mask, keys)
        values["mlm_logits"] = model.word_head(masked, model.text_encoder.embeddings.word_embeddings.weight)
        values["loss_mlm"] = mlm_loss(values["mlm_logits"], inputs["mlm_labels"])
    return values


def recorded_choices(inputs: dict[str, torch.Tensor], prefix: str = "") -> RandomChoices:
    """The recorded random choices."""
    return RandomChoices(
        inputs.get(prefix + "itm_image_neg_idx"),
        inputs.get(prefix + "itm_text_neg_idx"),
        inputs.get(prefix + "mlm_input_ids"),
        inputs.get(prefix + "mlm_labels"),
    )


def _values(model: Singularity, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
    batch, recorder = len(inputs["idx"]), Recorder()
    _watch_layers(model, recorder, batch)
    losses = model(
        inputs["image"], inputs["input_ids"], inputs["attention_mask"], inputs["idx"], recorded_choices(inputs)
    )
    recorder.stop()
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    with torch.no_grad():
        values = recorder.values | _values(model, inputs)
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
