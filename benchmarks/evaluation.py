"""Compares re-ranking with one query at a time, at equal scores; and measures its growth with the gallery.

    python benchmarks/evaluation.py                          1,000 clips x 1,000 texts, both variants, alternating
    python benchmarks/evaluation.py --grow 1000 2000 5000 10000    ours alone, time and memory
    python benchmarks/evaluation.py --device cuda --size base --dtype bf16      on a GPU

One query at a time, as in the official code: for each clip its k_test texts and for each text its k_test clips go
through the fusion layers as one batch, texts padded to the full length, keys and values projected for every pair.
Ours: `eval.tasks.retrieval.score`. Both start from the same encoded clips and texts. Clips are random pixels, texts
random tokens of a caption's length, weights are random. Times on a CPU are CPU seconds on one core, which a busy
machine hardly changes (OMP_NUM_THREADS=1); on a GPU they are wall time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # else a file here hides the package `model`

import numpy as np
import torch

from benchmarks.model import SIZES, random_texts
from eval.config import EvalConfig
from eval.features import TextFeatures, VisualFeatures, collect_visuals, encode_blocks, encode_texts
from eval.metrics import top_k_mask
from eval.tasks.retrieval import NOT_RERANKED, Scores, score
from model.singularity import Singularity
from train.deepspeed.engine import DTYPES
from train.job.devices import choose_kernels


def seconds_now(device: str) -> float:
    """CPU time of the process; on a GPU wall time after synchronising."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def make_model(options: argparse.Namespace) -> Singularity:
    """Random weights that make every score depend on its pair."""
    torch.manual_seed(0)
    model = Singularity(SIZES[options.size]).to(options.device).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.05)
    return model.to(DTYPES[options.dtype])


def clips(model: Singularity, count: int, frames: int, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Random clips, the same each time, batch by batch, and their numbers."""
    size, device = model.config.image_res, model.temp.device
    for start in range(0, count, batch):
        generator = torch.Generator(device).manual_seed(start)
        indices = torch.arange(start, min(count, start + batch))
        shape = (len(indices), frames, 3, size, size)
        yield torch.randn(shape, generator=generator, device=device).to(model.temp.dtype), indices


def match_one_query(model: Singularity, states: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor) -> np.ndarray:
    """VTM logits (P,) of P pairs, row by row, without sharing."""
    fused = model.text_encoder.fuse(states, mask, model.visual_keys(tokens))
    return model.itm_head(fused[:, 0])[:, 1].cpu().numpy()


def one_query_at_a_time(
    model: Singularity, visuals: VisualFeatures, states: torch.Tensor, mask: torch.Tensor, found: TextFeatures, k: int
) -> Scores:
    """The same scores with one batch for each query; states (M, Lt, D) and mask of the texts."""
    tokens = torch.cat([block.tokens[:, 0] for block in visuals.blocks]).to(states.device)
    similarity = (visuals.embeddings @ found.embeddings.T).float().cpu().numpy()
    visual_to_text = np.full(similarity.shape, NOT_RERANKED, dtype=np.float32)
    text_to_visual = np.full(similarity.T.shape, NOT_RERANKED, dtype=np.float32)
    for n, row in enumerate(top_k_mask(similarity, k)):
        chosen = np.flatnonzero(row)
        repeated = tokens[n, None].repeat(len(chosen), 1, 1)
        visual_to_text[n, chosen] = match_one_query(model, states[chosen], mask[chosen], repeated)
    for m, row in enumerate(top_k_mask(similarity.T, k)):
        chosen = np.flatnonzero(row)
        text = states[m, None].repeat(len(chosen), 1, 1), mask[m, None].repeat(len(chosen), 1)
        text_to_visual[m, chosen] = match_one_query(model, *text, tokens[chosen])
    return Scores(similarity, visual_to_text, text_to_visual)


def encoded(
    options: argparse.Namespace, model: Singularity, size: int, config: EvalConfig
) -> tuple[VisualFeatures, TextFeatures, torch.Tensor, torch.Tensor]:
    """Clips and texts through their encoders, and the texts' states and mask at their full length."""
    blocks = encode_blocks(model, clips(model, size, options.frames, options.batch), config)
    visuals = collect_visuals(model, blocks, size, config)
    texts = random_texts(torch.Generator().manual_seed(1), model.config, size, options.length, options.words)
    ids, mask = (part.to(options.device) for part in texts)
    states = torch.cat([model.encode_text(*part)[0] for part in zip(ids.split(256), mask.split(256))])
    return visuals, encode_texts(model, ids, mask), states, mask


def matched_pairs(scores: Scores) -> int:
    """Number of pairs that went through the fusion layers."""
    assert scores.visual_to_text is not None
    assert scores.text_to_visual is not None
    return int(((scores.visual_to_text > NOT_RERANKED) | (scores.text_to_visual.T > NOT_RERANKED)).sum())


def peak_memory(device: str) -> float:
    """GB of the GPU, or of the process."""
    if device == "cpu":
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return round(torch.cuda.max_memory_allocated() / 1e9, 2)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Both variants, alternating."""
    model, config = make_model(options), EvalConfig(k_test=options.k_test, pair_batch_size=options.pairs)
    visuals, found, states, mask = encoded(options, model, options.gallery, config)
    seconds: dict[str, list[float]] = {"ours": [], "one query at a time": []}
    deviation = 0.0
    for _ in range(options.repeats):
        began = seconds_now(options.device)
        ours = score(model, visuals, found, config)
        seconds["ours"].append(seconds_now(options.device) - began)
        began = seconds_now(options.device)
        theirs = one_query_at_a_time(model, visuals, states, mask, found, options.k_test)
        seconds["one query at a time"].append(seconds_now(options.device) - began)
        assert ours is not None
        for name in ("visual_to_text", "text_to_visual"):
            deviation = max(deviation, float(np.abs(getattr(ours, name) - getattr(theirs, name)).max()))
    assert ours.visual_to_text is not None
    pairs = matched_pairs(ours)
    spread = float(ours.visual_to_text[ours.visual_to_text > NOT_RERANKED].std())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [b / a for a, b in zip(*seconds.values())]
    return {
        "gallery": options.gallery,
        "k_test": options.k_test,
        "pairs": pairs,
        "median_seconds": {name: round(value, 2) for name, value in medians.items()},
        "pairs_per_second": round(pairs / medians["ours"]),
        "faster": round(statistics.median(ratios), 2),
        "each": [round(value, 2) for value in ratios],
        "largest_deviation": f"{deviation:.1e}",
        "standard_deviation_of_scores": round(spread, 3),
    }


def grow(options: argparse.Namespace, size: int) -> dict[str, Any]:
    """Ours for one gallery size; features are on disk if a folder is given."""
    model, config = make_model(options), EvalConfig(k_test=options.k_test, pair_batch_size=options.pairs)
    began = seconds_now(options.device)
    visuals, found, _, _ = encoded(options, model, size, config)
    ready = seconds_now(options.device)
    result = score(model, visuals, found, config)
    done = seconds_now(options.device)
    assert result is not None
    pairs = matched_pairs(result)
    return {
        "gallery": size,
        "k_test": options.k_test,
        "encode_seconds": round(ready - began, 1),
        "match_seconds": round(done - ready, 1),
        "pairs": pairs,
        "pairs_per_second": round(pairs / (done - ready)),
        "clips_per_second": round(size / (ready - began), 1),
        "peak_memory_gb": peak_memory(options.device),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--size", choices=SIZES, default="tiny")
    result.add_argument("--gallery", type=int, default=1000, help="number of clips, and of texts")
    result.add_argument("--grow", type=int, nargs="+", metavar="GALLERY", help="only ours, at ascending sizes")
    result.add_argument("--k_test", type=int, default=128)
    result.add_argument("--frames", type=int, default=4)
    result.add_argument("--length", type=int, default=32, help="tokens that texts are padded to")
    result.add_argument("--words", type=float, default=12, help="mean tokens of a text")
    result.add_argument("--batch", type=int, default=32, help="clips encoded at once")
    result.add_argument("--pairs", type=int, default=EvalConfig.pair_batch_size)
    result.add_argument("--repeats", type=int, default=3)
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the model (default: %(default)s)")
    return result


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(1)
    choose_kernels(deterministic=False)
    with torch.inference_mode():
        for size in options.grow or []:
            print(json.dumps(grow(options, size)), flush=True)
        if not options.grow:
            print(json.dumps(compare(options)), flush=True)


if __name__ == "__main__":
    main()
