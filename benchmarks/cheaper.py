"""Measures a training step of a recipe's model at smaller images and with patch dropout, against the whole.

    python benchmarks/cheaper.py configs/small/pretrain.yaml --image-res 48 --patch-dropout 0.5
    python benchmarks/cheaper.py configs/pretrain.yaml --image-res 112 --patch-dropout 0.5 --precision bf16 --batch 128

Forward, backward and AdamW on random images and texts, without the loader, in alternating rounds. Prints the median
milliseconds of a step, and its part of the whole's: by the clock on a GPU, by CPU time on a CPU, which other programs
disturb less.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from loaders.decode.choice import usual_device
from model.backbones import adopt_backbone
from model.building import build_model
from model.config import ModelConfig, with_changes
from train.config.settings import load_settings
from train.deepspeed.engine import DTYPES


def make_step(config: ModelConfig, batch: int, length: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """A step on `batch` pairs of an image and a text of `length` tokens."""
    model = build_model(config).to(device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    frames = torch.randn(batch, 1, 3, config.image_res, config.image_res, device=device, dtype=dtype)
    ids = torch.randint(200, config.text_encoder.vocab_size, (batch, length), device=device)
    mask, idx = torch.ones_like(ids), torch.arange(batch, device=device)

    def step() -> None:
        torch.stack(list(model(frames, ids, mask, idx).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], count: int, device: str) -> float:
    """Mean seconds of `count` steps."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    began = clock()
    for _ in range(count):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    return (clock() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml", help="a recipe, whose model is measured")
    parser.add_argument("--image-res", type=int, nargs="*", default=[], help="smaller sizes to measure")
    parser.add_argument("--patch-dropout", type=float, nargs="*", default=[], help="shares to measure")
    parser.add_argument("--batch", type=int, default=32, help="pairs (default: %(default)s)")
    parser.add_argument("--length", type=int, default=16, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--steps", type=int, default=2, help="of a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of each (default: %(default)s)")
    options = parser.parse_args()
    pretrained = ["vision_encoder.pretrained=null", "text_encoder.pretrained=null"]
    settings = load_settings(options.config, pretrained)
    config = ModelConfig.of(settings.config, 1)
    adopt_backbone(config, settings.explicit)
    device = usual_device()
    torch.set_num_threads(1)
    steps = {}
    for size, share in itertools.product([config.image_res, *options.image_res], [0.0, *options.patch_dropout]):
        changed = with_changes(config, {"image_res": size, "vision_encoder.patch_dropout": share})
        steps[size, share] = make_step(changed, options.batch, options.length, device, DTYPES[options.precision])
    taken: dict[tuple[int, float], list[float]] = {name: [] for name in steps}
    for number in range(options.rounds + 1):
        for name, step in steps.items():
            measured = seconds(step, options.steps if number else 1, device)  # a first one, which is not counted
            taken[name] += [measured] if number else []
    whole = taken[config.image_res, 0.0]
    print("image_res  patch_dropout  ms a step  part of the whole")
    for (size, share), each in taken.items():
        part = statistics.median(one / other for one, other in zip(each, whole))
        print(f"{size:9}  {share:13g}  {1000 * statistics.median(each):9.1f}  {part:17.2f}")


if __name__ == "__main__":
    main()
