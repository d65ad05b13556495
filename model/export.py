"""`python -m model.export`: writes a model as an official checkpoint (.pth) or as a folder of ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import UserError, command
from runtime.program import command_line
from sharding.shards.outside import check_outside_corpora
from storage.files import atomic_file

if TYPE_CHECKING:
    import torch

    from model.checkpoints.files import Weights
    from model.config import ModelConfig

# Endings of files that are not written here; folders in which a run's own weights are looked for.
OTHER_SUFFIXES = (".safetensors", ".ckpt", ".json", ".onnx", ".pkl", ".h5", ".npz", ".zip", ".tar", ".gz")
RESERVED = ("weights", "checkpoints")
OFFICIAL_SETTINGS = (
    "temporal_vision_encoder", "add_temporal_embed", "image_res", "embed_dim", "temp", "mlm_prob", "loss_weight",
    "itm_hard_neg",
)  # fmt: skip


def official_settings(config: ModelConfig) -> dict[str, Any]:
    """The settings of an official checkpoint that describe the model, and our ModelConfig, which it ignores."""
    from model.checkpoints.official import MODEL

    ours = asdict(config)
    own_names = {"vit_type": config.vision_encoder.type, "video_input": {"num_frames": config.num_frames}}
    return own_names | {name: ours[name] for name in OFFICIAL_SETTINGS} | {MODEL: ours}


def official_state(weights: Weights) -> dict[str, torch.Tensor]:
    """All entries of an official checkpoint's state dict: tensors, tied copies and index tables."""
    import torch

    from model.checkpoints.official_names import to_official
    from model.vision import relative_position_index

    config, mlm = weights.config, "word_head.bias" in weights.state
    prefix = "text_encoder.bert." if mlm else "text_encoder."
    result = to_official(weights.state, prefix)
    positions = torch.arange(config.text_encoder.max_positions)[None]
    result[prefix + "embeddings.position_ids"] = positions
    heads = [("text_encoder.", prefix)] if mlm else []
    if config.answer_decoder.enable:
        result["text_decoder.bert.embeddings.position_ids"] = positions
        heads.append(("text_decoder.", "text_decoder.bert."))
    for head, encoder in heads:
        result[head + "cls.predictions.decoder.weight"] = result[encoder + "embeddings.word_embeddings.weight"]
        result[head + "cls.predictions.decoder.bias"] = result[head + "cls.predictions.bias"]
    if config.vision_encoder.type == "beit":
        index = relative_position_index(config.image_res // config.vision_encoder.patch_size)
        for i in range(config.vision_encoder.depth):
            layer = f"vision_encoder.encoder.layer.{i}.attention.attention."
            result[layer + "relative_position_bias.relative_position_index"] = index
    return result


def without_losses(weights: Weights) -> Weights:
    """The weights without a user's losses, which have no place in an official checkpoint."""
    state = {name: tensor for name, tensor in weights.state.items() if not name.startswith("losses.")}
    return replace(weights, config=replace(weights.config, losses={}), state=state)


def write_official(weights: Weights, path: str | Path) -> None:
    """Write an official checkpoint (.pth) without optimiser state, whole or not at all.

    Raises UserError where backbone, text encoder, pooling or pixel statistics are not among the official ones.
    """
    import omegaconf
    import torch

    from model.backbones import PIXEL_STATISTICS, VISION_TYPES

    vision = weights.config.vision_encoder
    path, kind, weights = Path(path), vision.type, without_losses(weights)
    if kind not in VISION_TYPES:
        raise UserError(f"{path}: vision_encoder.type={kind} has no official format, give a folder to write to")
    for name, official in (("type", "bert"), ("pooling", "first")):
        if (value := getattr(weights.config.text_encoder, name)) != official:
            raise UserError(f"{path}: text_encoder.{name}={value} has no official format, give a folder to write to")
    for name, values, known in zip(("mean", "std"), (vision.mean, vision.std), PIXEL_STATISTICS[kind]):
        if values is not None and tuple(values) != known:
            raise UserError(
                f"{path}: vision_encoder.{name} is {values}, the official code has {list(known)} for {kind}: give a "
                "folder to write to"
            )
    content = {
        "model": official_state(weights),
        "optimizer": {},
        "scheduler": {},
        "scaler": {},
        "config": omegaconf.OmegaConf.create(official_settings(weights.config)),
        "epoch": 0,
        "global_step": 0,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened here: PyTorch hides the system's error, such as a full disk, for files that it opens itself.
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def check_output(output: str) -> None:
    """Raise UserError unless a model can be written to `output` without touching anything but an earlier export."""
    from model.checkpoints.files import DESCRIPTION, OFFICIAL_SUFFIXES, TENSORS, VOCABULARY
    from preprocessing.text import VOCABULARIES

    path = Path(output)
    official = path.suffix.lower() in OFFICIAL_SUFFIXES
    if path.suffix.lower() in OTHER_SUFFIXES:
        raise UserError(
            f"{output}: {path.suffix} is not a format, give NAME.pth for an official checkpoint or a folder such as "
            f"{path.with_suffix('')}, which gets {TENSORS}, {DESCRIPTION} and {VOCABULARY}"
        )
    if official and (output.endswith("/") or path.is_dir()):
        raise UserError(f"{output} is a folder with the suffix of a file: give NAME{path.suffix} or another folder")
    exported = {TENSORS, DESCRIPTION, *VOCABULARIES}
    if (path.is_file() and not official) or (path.is_dir() and {each.name for each in path.iterdir()} - exported):
        raise UserError(f"{output} exists already and is not an export: remove it, or choose another name")
    for folder in path.absolute().parents:
        if (folder / "checkpoints").is_dir() and path.absolute().relative_to(folder).parts[0] in RESERVED:
            raise UserError(f"{output} would be taken for a checkpoint of the run {folder}: choose another path")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{output} cannot be created: {folder} is a file, choose another path")


def without_vocabulary(output: str, vocabulary: Path | None) -> str:
    """The hint for an export without a vocabulary."""
    from model.checkpoints.files import OFFICIAL_SUFFIXES, VOCABULARY

    found = f" ({vocabulary})" if vocabulary else ""
    remedy = "" if Path(output).suffix.lower() in OFFICIAL_SUFFIXES else f"copy it to {Path(output) / VOCABULARY}, or "
    return (
        f"{output} has no vocabulary; where it is used {remedy}name the one that it was trained with{found}: "
        "tokenizer=FILE for training and evaluation, --tokenizer FILE for eval.search"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog=command_line("model.export"),
        description="Write a model, ours or official, to an official checkpoint (OUTPUT ends in .pth) or to a folder "
        "of ours (model.safetensors, model.json and the vocabulary). All tensors are written bit for bit.",
    )
    result.add_argument("model", help="a folder with model.json, a run folder (its best or newest), or a .pth")
    result.add_argument("output", help="what to write: NAME.pth, or a folder; an earlier export is replaced")
    return result


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parser().parse_args(arguments)
    from model.checkpoints.files import OFFICIAL_SUFFIXES, find_vocabulary, write_folder
    from model.checkpoints.loading import find_weights

    check_outside_corpora(options.output, "OUTPUT")
    check_output(options.output)
    found, weights = find_weights(options.model)
    if found.resolve() == Path(options.output).resolve():
        raise UserError(f"{options.output} is the model to be exported: choose another name")
    vocabulary = find_vocabulary(found, weights.config.text_encoder.vocab_size)
    official = Path(options.output).suffix.lower() in OFFICIAL_SUFFIXES
    if official:
        weights = without_losses(weights)
        write_official(weights, options.output)
    else:
        write_folder(weights, vocabulary, Path(options.output))
    sys.stdout.write(f"{options.output}: {len(weights.state)} tensors of {found}\n")
    if official or vocabulary is None:
        sys.stdout.write(without_vocabulary(options.output, vocabulary) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
