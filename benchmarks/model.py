"""Measures time and memory of a training step: this model, and a straightforward implementation with the same weights.

    python benchmarks/model.py --size base --batch 8                      on a CPU
    python benchmarks/model.py --size base --batch 128 --dtype bf16 --device cuda --compile

Straightforward, as in the official code: eager attention, one fusion pass over 3B pairs with repeated visuals and
another for MLM, MLM logits at every position. Ours: `Singularity.forward`. Both use the same batch, weights and random
choices; their losses are printed side by side.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else this file hides the package `model`

import torch
from torch.nn import functional

from model.bert import additive_mask
from model.config import ModelConfig, TextConfig, VisionConfig
from model.flops import image_flops, layer_flops, step_flops
from model.losses import contrastive_loss, contrastive_targets, matching_loss, mlm_loss
from model.singularity import RandomChoices, Singularity
from train.job.devices import choose_kernels
from train.tracking.metrics import peak_flops

SIZES = {
    "base": ModelConfig(),
    "tiny": ModelConfig(
        vision_encoder=VisionConfig(width=192, depth=4, heads=3),
        text_encoder=TextConfig(vocab_size=4000, width=192, layers=4, fusion_layer=2, heads=3, intermediate=768),
        image_res=64,
    ),
}


def random_texts(
    generator: torch.Generator, config: ModelConfig, count: int, length: int, words: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (count, length) of random texts of `words` tokens on average, at least 4."""
    ids = torch.randint(1000, config.text_encoder.vocab_size, (count, length), generator=generator)
    ids[:, 0] = 101
    lengths = (torch.randn(count, generator=generator) * words / 3 + words).round().clamp(4, length)
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    return ids * mask, mask


def make_batch(config: ModelConfig, pairs: int, frames: int, length: int, words: float) -> dict[str, torch.Tensor]:
    """Random clips and texts of `words` tokens on average, padded to `length`; and random choices."""
    generator = torch.Generator().manual_seed(0)
    size = config.image_res
    ids, mask = random_texts(generator, config, pairs, length, words)
    chosen = (torch.rand(pairs, length, generator=generator) < config.mlm_prob) & mask.bool()
    chosen[:, 0] = False
    return {
        "frames": torch.randn(pairs, frames, 3, size, size, generator=generator),
        "input_ids": ids,
        "attention_mask": mask,
        "idx": torch.arange(pairs),
        "negatives": torch.arange(pairs).roll(1),
        "masked_ids": torch.where(chosen, 103, ids),
        "labels": torch.where(chosen, ids, -100),
    }


def ours(model: Singularity, batch: dict[str, torch.Tensor], given_words: bool = False) -> dict[str, torch.Tensor]:
    """A step of this model; masks tokens itself, as in training, unless masked ones are given."""
    words = (batch["masked_ids"], batch["labels"]) if given_words else (None, None)
    choices = RandomChoices(batch["negatives"], batch["negatives"], *words)
    inputs = [batch[name] for name in ("frames", "input_ids", "attention_mask", "idx")]
    return model(*inputs, choices)


def eager_cross_attention(core: Any, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Attention of texts (P, Lt, D) to one visual each (P, S, D), with explicit probabilities."""
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
    for layer in model.text_encoder.fusion_layers:
        states, _ = layer.attention(states, self_mask)
        cross = eager_cross_attention(layer.crossattention.self, states, tokens)
        states = layer.crossattention.output(cross, states)
        states = layer.output(layer.intermediate(states), states)
    return states


def straightforward(model: Singularity, batch: dict[str, torch.Tensor], _: bool = True) -> dict[str, torch.Tensor]:
    """The same losses, computed as in the official code, for the given masked tokens."""
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
    masked = straightforward_fusion(model, model.text_encoder(batch["masked_ids"], mask), mask, tokens)
    words = model.word_head(masked, model.text_encoder.word_matrix())
    return {
        "loss_itc": contrastive_loss(similarity, similarity.T, contrastive_targets(batch["idx"])),
        "loss_itm": matching_loss(model.itm_head(fused[:, 0]), has_negative),
        "loss_mlm": mlm_loss(words, batch["labels"]),
    }


def eager_attention(model: Singularity) -> Singularity:
    """The model with explicit attention probabilities instead of fused kernels."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
        if hasattr(module, "config") and hasattr(module.config, "_attn_implementation"):
            module.config._attn_implementation = "eager"
    return model


Step = Callable[[], dict[str, torch.Tensor]]


def one_step(step: Step, model: Singularity, backward: bool, cuda: bool) -> float:
    """Seconds of one step; on a CPU with one thread CPU time, which other programs disturb less."""
    clock = time.process_time if not cuda and torch.get_num_threads() == 1 else time.perf_counter
    model.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    with torch.set_grad_enabled(backward):
        losses = step()
    if backward:
        torch.stack(list(losses.values())).sum().backward()
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


Memory = dict[str, float]


def peak_memory(step: Step, model: Singularity, cuda: bool) -> Memory:
    """Peak GB of a forward pass without gradients, then of a step with its backward pass.

    Of the GPU, or of the process, which then must be one that runs this side and nothing else before.
    """
    found = {}
    for name, backward in (("forward", False), ("forward_backward", True)):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        one_step(step, model, backward, cuda)
        peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found[name] = round(peak / 1e9, 2)
    return found


def prepare(options: argparse.Namespace, straight: bool) -> tuple[Step, Step, Singularity, int]:
    """A training step of one variant, the same with given masked tokens, its model, and its text length."""
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
    compiled = torch.compile(function, fullgraph=True) if options.compile and not straight else function

    def step() -> dict[str, torch.Tensor]:
        with torch.autocast(options.device, dtype=torch.float16 if cuda else dtype, enabled=autocast):
            return compiled(model, batch)

    def given_words() -> dict[str, torch.Tensor]:
        return function(model, batch, True)

    return step, given_words, model, batch["input_ids"].shape[1]


def report(
    options: argparse.Namespace, way: str, seconds: dict[bool, list[float]], flops: dict[str, int], memory: Memory
) -> dict[str, Any]:
    """Medians of one variant, and its rate by its own operation count."""
    forward, both = (statistics.median(seconds[backward]) for backward in (False, True))
    rate = 3 * flops["total"] / both
    result = {
        "way": way,
        "forward_s": round(forward, 4),
        "forward_backward_s": round(both, 4),
        "samples_per_s": round(options.batch / both, 2),
        "gflop_forward_a_sample": {name: round(count / options.batch / 1e9, 2) for name, count in flops.items()},
        "tflop_per_s": round(rate / 1e12, 3),
        "peak_gb": memory,
    }
    peak = peak_flops(torch.device(options.device))
    return result | ({"mfu": round(rate / peak, 3)} if peak else {})


def straightforward_flops(model: Singularity, pairs: int, frames: int, length: int) -> dict[str, int]:
    """Forward operations of the straightforward variant: keys of every pair, MLM logits at every position."""
    result = dict(step_flops(model, pairs, frames, length))
    vision, text = model.config.vision_encoder, model.config.text_encoder
    source = image_flops(model)[1] * frames
    layer = layer_flops(length, text.width, text.intermediate, length)
    cross = 4 * length * text.width**2 + 4 * length * source * text.width + 4 * source * vision.width * text.width
    result["fusion"] = (text.layers - text.fusion_layer) * 4 * pairs * (layer + cross)
    result["mlm"] = pairs * length * (2 * text.width**2 + 2 * text.width * text.vocab_size)
    result.pop("total")
    return result | {"total": sum(result.values())}


def memory_apart(way: str) -> Memory:
    """`peak_memory` of one variant in a separate process, on a CPU."""
    words = [sys.executable, __file__, *sys.argv[1:], "--only", way, "--repeats", "0"]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)["peak_gb"]


def compare(options: argparse.Namespace, ways: list[str]) -> None:
    """Run the variants in turn; print a line for each and the ratios of their medians."""
    cuda = options.device == "cuda"
    sides = {way: prepare(options, way == "straightforward") for way in ways}
    memory = {}
    for way, (step, _, model, _) in sides.items():
        memory[way] = peak_memory(step, model, cuda) if cuda or len(ways) == 1 else memory_apart(way)
        model.zero_grad(set_to_none=True)
    if not options.repeats:
        print(json.dumps({"way": ways[0], "peak_gb": memory[ways[0]]}))
        return
    seconds: dict[str, dict[bool, list[float]]] = {way: {False: [], True: []} for way in ways}
    for repeat in range(options.repeats + 1):
        for way, (step, _, model, _) in sides.items():
            for backward, taken in seconds[way].items():
                each = one_step(step, model, backward, cuda)
                if repeat:  # the first one warms up
                    taken.append(each)
            model.zero_grad(set_to_none=True)
    medians = {}
    for way, (_, given_words, model, length) in sides.items():
        count = straightforward_flops if way == "straightforward" else step_flops
        flops = count(model, options.batch, options.frames, length)
        model.eval()
        with torch.no_grad():
            losses = {name: round(float(loss), 5) for name, loss in given_words().items()}
        result = report(options, way, seconds[way], flops, memory[way])
        print(json.dumps(result | {"losses_eval": losses}))
        medians[way] = [statistics.median(seconds[way][backward]) for backward in (False, True)]
    if len(ways) == 2:
        ratios = [a / b for a, b in zip(medians["straightforward"], medians["ours"])]
        print(json.dumps({"speedup_forward": round(ratios[0], 2), "speedup_forward_backward": round(ratios[1], 2)}))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--size", choices=SIZES, default="base")
    result.add_argument("--batch", type=int, default=8, help="pairs")
    result.add_argument("--frames", type=int, default=1)
    result.add_argument("--text-length", type=int, default=32, help="tokens after padding")
    result.add_argument("--words", type=float, default=13, help="tokens of a text on average, before padding")
    result.add_argument(
        "--trim",
        action="store_true",
        help="ours: texts as long as the longest of the batch, a multiple of 8, as runs have them",
    )
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    result.add_argument("--no-dropout", action="store_true")
    result.add_argument("--compile", action="store_true", help="ours under torch.compile, one graph")
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    result.add_argument("--repeats", type=int, default=5, help="0: peak memory only")
    result.add_argument("--only", choices=("ours", "straightforward"))
    return result


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(options.threads)
    choose_kernels(deterministic=False)
    compare(options, [way for way in ("straightforward", "ours") if options.only in (None, way)])


if __name__ == "__main__":
    main()
