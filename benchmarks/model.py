"""Time and memory of a training step: this model, and the same weights used the straightforward way.

    python benchmarks/model.py --size base --batch 8                      on a CPU
    python benchmarks/model.py --size base --batch 128 --dtype bf16 --device cuda --compile

Straightforward: eager attention, one fusion pass over 3B pairs with the visuals repeated and another one for the
masked words, word logits at every position; what the official code does. Ours: `Singularity.forward`.
Both get the same batch, the same weights and the same random choices; their losses are printed side by side.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else this file hides the package `model`

import torch
from torch.nn import functional

from model.config import ModelConfig, TextConfig, VisionConfig
from model.flops import step_flops
from model.losses import contrastive_loss, contrastive_targets, matching_loss, word_loss
from model.singularity import Draws, Singularity
from model.text import additive_mask

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bf16 FLOP/s
SIZES = {
    "base": ModelConfig(),
    "tiny": ModelConfig(
        vision_encoder=VisionConfig(width=192, depth=4, heads=3),
        text_encoder=TextConfig(vocab_size=4000, width=192, layers=4, fusion_layer=2, heads=3, intermediate=768),
        image_res=64,
    ),
}


def make_batch(config: ModelConfig, pairs: int, frames: int, length: int, words: float) -> dict[str, torch.Tensor]:
    """Random clips and texts of `words` tokens on average (at least 4), padded to `length`; and random choices."""
    generator = torch.Generator().manual_seed(0)
    size, vocabulary = config.image_res, config.text_encoder.vocab_size
    ids = torch.randint(1000, vocabulary, (pairs, length), generator=generator)
    ids[:, 0] = 101
    lengths = (torch.randn(pairs, generator=generator) * words / 3 + words).round().clamp(4, length)
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    chosen = (torch.rand(pairs, length, generator=generator) < config.mlm_prob) & mask.bool()
    chosen[:, 0] = False
    return {
        "frames": torch.randn(pairs, frames, 3, size, size, generator=generator),
        "input_ids": ids * mask,
        "attention_mask": mask,
        "idx": torch.arange(pairs),
        "negatives": torch.arange(pairs).roll(1),
        "masked_ids": torch.where(chosen, 103, ids * mask),
        "labels": torch.where(chosen, ids, -100),
    }


def ours(model: Singularity, batch: dict[str, torch.Tensor], given_words: bool = False) -> dict[str, torch.Tensor]:
    """This model's step; it masks words itself, as in training, unless they are to be the given ones."""
    words = (batch["masked_ids"], batch["labels"]) if given_words else (None, None)
    draws = Draws(batch["negatives"], batch["negatives"], *words)
    inputs = [batch[name] for name in ("frames", "input_ids", "attention_mask", "idx")]
    return model(*inputs, draws)


def eager_cross_attention(core: Any, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Attention of texts (P, Lt, D) to one visual each (P, S, D), probabilities written out."""
    keys, values = core.project(tokens)
    query = core.query(states).unflatten(-1, (core.heads, -1)).transpose(1, 2)
    scores = query @ keys.transpose(2, 3) / query.shape[-1] ** 0.5
    scores = functional.dropout(scores.softmax(-1), core.dropout, core.training)
    return (scores @ values).transpose(1, 2).flatten(2)


def straightforward_fusion(
    model: Singularity, states: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Fusion layers over pairs, row by row: states (P, Lt, D), tokens (P, S, D)."""
    self_mask = additive_mask(mask, states.dtype)
    for layer in model.text_encoder.layer[model.text_encoder.fusion_layer :]:
        states, _ = layer.attention(states, self_mask)
        cross = eager_cross_attention(layer.crossattention.self, states, tokens)
        states = layer.crossattention.output(cross, states)
        states = layer.output(layer.intermediate(states), states)
    return states


def straightforward(model: Singularity, batch: dict[str, torch.Tensor], _: bool = True) -> dict[str, torch.Tensor]:
    """The same losses, computed as the official code does, for the given words."""
    ids, mask, negatives = batch["input_ids"], batch["attention_mask"], batch["negatives"]
    tokens, pooled = model.encode_visual(batch["frames"])
    states, pooled_text = model.encode_text(ids, mask)
    similarity = model.similarity(pooled, pooled_text) / model.temperature()
    fused = straightforward_fusion(
        model,
        torch.cat([states, states, states[negatives]]),
        torch.cat([mask, mask, mask[negatives]]),
        torch.cat([tokens, tokens[negatives], tokens]),
    )
    has_negative = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    masked = straightforward_fusion(model, model.text_encoder.encode(batch["masked_ids"], mask), mask, tokens)
    words = model.word_head(masked, model.text_encoder.embeddings.word_embeddings.weight)
    return {
        "loss_itc": contrastive_loss(similarity, contrastive_targets(batch["idx"])),
        "loss_itm": matching_loss(model.itm_head(fused[:, 0]), has_negative),
        "loss_mlm": word_loss(words, batch["labels"]),
    }


def eager_attention(model: Singularity) -> Singularity:
    """The model with attention probabilities written out instead of fused kernels."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = "eager"
    return model


Step = Callable[[], dict[str, torch.Tensor]]


def timed(step: Step, backward: bool, repeats: int, cuda: bool) -> tuple[float, float]:
    """Fastest of `repeats` runs in seconds, after one to warm up; and peak memory in GB (of the GPU, else process).

    On a CPU with one thread the process's own time is taken, which other programs on the machine disturb less.
    """
    clock = time.process_time if not cuda and torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    for _ in range(repeats + 1):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = clock()
        with torch.set_grad_enabled(backward):
            losses = step()
        if backward:
            torch.stack(list(losses.values())).sum().backward()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return min(seconds[1:]), peak / 1e9


def measure(options: argparse.Namespace, straight: bool) -> dict[str, Any]:
    """Times of one way, forward alone and forward with backward, on the device."""
    cuda = options.device == "cuda"
    config = SIZES[options.size]
    torch.manual_seed(0)
    model = Singularity(config).to(options.device)
    model.train(not options.no_dropout)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    autocast = straight and dtype != torch.float32  # as the official code; ours has its weights in bfloat16
    if straight:
        eager_attention(model)
    else:
        model = model.to(dtype)
    batch = make_batch(config, options.batch, options.frames, options.text_length, options.words)
    if not straight and options.trim:
        longest = int(batch["attention_mask"].sum(1).max())
        longest = min(options.text_length, -(-longest // 8) * 8)
        for name in ("input_ids", "attention_mask", "masked_ids", "labels"):
            batch[name] = batch[name][:, :longest].contiguous()
    batch = {name: tensor.to(options.device) for name, tensor in batch.items()}
    function = straightforward if straight else ours
    if options.compile and not straight:
        function = torch.compile(function, fullgraph=True)

    def step() -> dict[str, torch.Tensor]:
        with torch.autocast(options.device, dtype=torch.float16 if cuda else dtype, enabled=autocast):
            return function(model, batch)

    forward, _ = timed(step, False, options.repeats, cuda)
    both, memory = timed(step, True, options.repeats, cuda)
    with torch.no_grad():
        model.eval()
        losses = {name: round(float(loss), 5) for name, loss in function(model, batch, True).items()}
    flops = step_flops(config, options.batch, options.frames, batch["input_ids"].shape[1])
    report = {
        "way": "straightforward" if straight else "ours",
        "forward_s": round(forward, 4),
        "forward_backward_s": round(both, 4),
        "samples_per_s": round(options.batch / both, 2),
        "tflop_per_s": round(3 * flops["total"] / both / 1e12, 3),
        "peak_gb": round(memory, 2),
        "losses_eval": losses,
    }
    peak = next((value for name, value in PEAKS.items() if cuda and name in torch.cuda.get_device_name()), None)
    return report | ({"mfu": round(3 * flops["total"] / both / peak, 3)} if peak else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=8, help="pairs")
    parser.add_argument("--frames", type=int, default=1)
    parser.add_argument("--text-length", type=int, default=32, help="tokens after padding")
    parser.add_argument("--words", type=float, default=13, help="tokens of a text on average, before padding")
    parser.add_argument(
        "--trim", action="store_true", help="ours: texts padded to the batch's longest, as the loader does"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--no-dropout", action="store_true")
    parser.add_argument("--compile", action="store_true", help="ours under torch.compile, one graph")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", choices=("ours", "straightforward"))
    options = parser.parse_args()
    config = SIZES[options.size]
    print(
        json.dumps({"gflop_forward_a_sample": step_flops(config, 1, options.frames, options.text_length)}, default=str)
    )
    ways = [way for way in ("straightforward", "ours") if options.only in (None, way)]
    reports = [measure(options, way == "straightforward") for way in ways]
    for report in reports:
        print(json.dumps(report))
    if len(reports) == 2:
        ratio = reports[0]["forward_backward_s"] / reports[1]["forward_backward_s"]
        print(json.dumps({"speedup_forward_backward": round(ratio, 2)}))


if __name__ == "__main__":
    main()
