"""The schedule of image sizes: the first epochs at smaller sizes, which cost less, the rest at `image_res`.

Progressive resizing: Howard, 2018 (DAWNBench); Touvron et al., "Fixing the train-test resolution discrepancy", 2019;
Tan and Le, "EfficientNetV2", 2021.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

from model.building import Model, build_model
from model.checkpoints.loading import resized
from model.config import with_changes
from preprocessing.text import Tokenizer
from runtime.activity import progress
from runtime.errors import UserError
from train.config.settings import RunConfig


def image_sizes(run: RunConfig) -> list[tuple[int, int]]:
    """(first epoch, height and width of a frame in pixels) of each stage of training, in order; the last: `image_res`.

    Raises UserError unless the sizes grow to `image_res` within `scheduler.epochs`.
    """
    key, smaller = "scheduler.image_res", run.scheduler.image_res
    sizes, epochs = [*smaller, run.image_res], list(smaller.values())
    for size, following in pairwise(sizes):
        if not 1 <= size < following:
            what = f"image_res, {run.image_res}" if following == run.image_res else f"the following size, {following}"
            raise UserError(f"{key} has the size {size}: must be at least 1 and smaller than {what}")
    for size, count in smaller.items():
        if count < 1:
            raise UserError(f"{key} has {count} epochs at {size} pixels: must be at least 1, or leave that size out")
    if epochs and sum(epochs) >= run.scheduler.epochs:
        raise UserError(
            f"{key} has {sum(epochs)} epochs at smaller sizes, scheduler.epochs is {run.scheduler.epochs}: leave at "
            "least one epoch for image_res"
        )
    return list(zip(accumulate(epochs, initial=0), sizes))


def image_res_at(run: RunConfig, epoch: int) -> int:
    """The image size of an epoch = 0, 1, ..."""
    return [size for first, size in image_sizes(run) if first <= epoch][-1]


def check_sizes(model: Model, run: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError unless the tensors of `model`, which is of the first size, can be resized to all later ones."""
    for _, size in image_sizes(run)[1:]:
        progress(f"building the model with image_res={size}")
        other = model_of_size(model, size, tokenizer)
        shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
        for name, tensor in model.state_dict().items():
            if tensor.shape != shapes[name] != resized(other, name, tensor, shapes[name]).shape:
                raise UserError(
                    f"scheduler.image_res: {name} of vision_encoder.type={model.config.vision_encoder.type} cannot be "
                    f"resized to image_res={size}: its class needs a method `resized`, or leave scheduler.image_res out"
                )


def model_of_size(model: Model, image_res: int, tokenizer: Tokenizer) -> Model:
    """A model that differs from `model` in the image size only, with random weights."""
    result = build_model(with_changes(model.config, {"image_res": image_res}), tokenizer.special_ids)
    result.history = model.history
    return result
