"""`python -m train.filters CONFIG.yaml`: makes the filters of vision_encoder.type=patch_filters from photos."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import UserError, command
from runtime.program import as_started, command_line
from sharding.shards.outside import check_outside_corpora
from storage.files import atomic_file
from train.config.settings import RunConfig, load_settings

if TYPE_CHECKING:
    import torch

    from loaders.train import TrainLoader
    from model.patch_filters import PatchFilterEncoder

IMAGES = 4096  # at most; more change the filters little


def learn_filters(run: RunConfig) -> tuple[Path, int]:
    """Write the filters, made of images of `train_corpus`, to the folder that `vision_encoder.pretrained` names.

    Returns the file and how many images there were. Raises UserError.
    """
    import torch
    from safetensors.torch import save_file

    from loaders.train import TrainLoader
    from model.config import ModelConfig
    from model.patch_filters import FILE, PatchFilterEncoder
    from model.vision import build_vision

    vision = run.vision_encoder
    torch.manual_seed(run.seed)
    encoder = build_vision(ModelConfig.of(run, num_frames=1))
    if not isinstance(encoder, PatchFilterEncoder):
        raise UserError(f"vision_encoder.type is {vision.type}: only patch_filters has filters to make")
    if vision.pretrained is None:
        raise UserError("vision_encoder.pretrained is not set: name a folder for the filters")
    check_outside_corpora(vision.pretrained, "vision_encoder.pretrained")
    target = Path(vision.pretrained) / FILE
    with TrainLoader(run.train_urls(), None, replace(run, quarantine_file="")) as loader:
        count = encoder.filters.learn(_images(loader, encoder))
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as path:
        save_file({name: tensor.contiguous() for name, tensor in encoder.filters.state_dict().items()}, path)
    return target, count


def _images(loader: TrainLoader, encoder: PatchFilterEncoder) -> Iterator[torch.Tensor]:
    """Normalised images (N, 3, H, W) of the first epoch, batch after batch."""
    from preprocessing.normalization import normalize

    count = 0
    for batch in loader.epoch(0):
        yield normalize(batch.frames, encoder.mean, encoder.std).flatten(0, 1)
        count += len(batch.frames)
        if count >= IMAGES:
            break


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog=command_line("train.filters"), description=as_started(__doc__))
    result.add_argument("config", metavar="CONFIG.yaml", help="the configuration of the training")
    result.add_argument("settings", nargs="*", metavar="key=value", help="settings that override it")
    return result


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    path, count = learn_filters(load_settings(options.config, options.settings).config)
    sys.stdout.write(f"{path}: filters made of patches of {count} images\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
