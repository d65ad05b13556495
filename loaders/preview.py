"""`python -m loaders.preview`: a contact sheet of the model's input: cropped frames, texts as tokens."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loaders.config import LoaderConfig, PerMedia, VideoInput
from runtime.errors import command
from runtime.flags import positive
from runtime.plugins import load_plugins
from runtime.program import command_line
from sharding.shards.outside import check_outside_corpora

if TYPE_CHECKING:
    from PIL import Image

    from loaders.batch import Batch
    from preprocessing.text import Tokenizer

TEXT_LINES = 4


def batch_sheet(batch: Batch, tokenizer: Tokenizer, columns: int) -> Image.Image:
    """The pairs of a batch side by side: the frames of each in a row, its key and its tokens below."""
    from PIL import Image

    from sharding.report.contact_sheet import Cell, contact_sheet

    cells = []
    for key, frames, ids, mask in zip(batch.keys, batch.frames.numpy(), batch.input_ids, batch.attention_mask):
        text = " ".join(tokenizer.pieces(ids[mask.bool()].tolist()))
        cells.append(Cell([Image.fromarray(frame) for frame in frames], label=key, text=text))
    return contact_sheet(cells, columns, batch.frames.shape[2], TEXT_LINES)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        command_line("loaders.preview"), description="Draw the first batch of an epoch as the model sees it."
    )
    result.add_argument("corpus", metavar="URL", help="a packed corpus")
    result.add_argument("--tokenizer", required=True, help="vocab.txt, a folder that holds one, or a hub name")
    result.add_argument("--output", required=True, metavar="FILE", help="image file to write, .png or .jpg")
    result.add_argument("--count", type=positive, default=24, help="maximum number of samples (default: %(default)s)")
    result.add_argument("--columns", type=positive, default=6, help="samples side by side (default: %(default)s)")
    result.add_argument("--size", type=positive, default=224, help="image_res (default: %(default)s)")
    result.add_argument("--frames", type=positive, default=1, help="frames per clip (default: %(default)s)")
    result.add_argument("--sample-type", default="rand", help="frames of a clip (default: %(default)s)")
    result.add_argument("--plugins", nargs="+", default=[], metavar="MODULE", help="modules of your own to import")
    result.add_argument("--augmentations", nargs="+", default=[], metavar="NAME", help="those of your plugins to apply")
    result.add_argument("--length", type=positive, default=32, help="maximum tokens of a text (default: %(default)s)")
    result.add_argument("--epoch", type=int, default=0, help="(default: %(default)s)")
    result.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    result.add_argument("--no-augment", action="store_true", help="plain resize, as in evaluation")
    result.add_argument(
        "--unit",
        choices=("samples", "captions", "questions"),
        help="(default: samples; questions if the corpus has no captions)",
    )
    return result


def first_batch(options: argparse.Namespace, tokenizer: Tokenizer) -> Batch:
    """The first batch of the epoch; the whole corpus if it has fewer samples than `options.count`."""
    from loaders.shards import describe
    from loaders.train import TrainLoader

    corpus = describe(options.corpus, LoaderConfig())
    unit = options.unit or ("samples" if sum(corpus.counts("captions")) else "questions")
    count = min(options.count, sum(corpus.counts(unit)))
    config = LoaderConfig(
        batch_size=PerMedia(count, count),
        image_res=options.size,
        video_input=VideoInput(num_frames=options.frames, sample_type=options.sample_type),
        max_txt_l=PerMedia(options.length, options.length),
        epoch_unit=unit,
        seed=options.seed,
        augment=not options.no_augment,
        augmentations=[] if options.no_augment else options.augmentations,
        prefetch=1,
        max_bad_share=1.0,
    )
    loader = TrainLoader([options.corpus], tokenizer, config)
    try:
        return next(loader.epoch(options.epoch))
    finally:
        loader.close()


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    check_outside_corpora(options.output, "--output")
    load_plugins(options.plugins)
    from preprocessing.text import Tokenizer

    tokenizer = Tokenizer.load(options.tokenizer)
    batch = first_batch(options, tokenizer)
    batch_sheet(batch, tokenizer, options.columns).save(options.output)
    sys.stdout.write(f"{options.output}: {len(batch.keys)} samples\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
