"""Weights on disk in our own format: found by a folder, a checkpoint or a run, written atomically."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.config import ModelConfig, config_from_dict
from model.history import History
from preprocessing.config import Preprocessing
from preprocessing.text import VOCABULARIES
from preprocessing.text import find_vocabulary as vocabulary_in
from runtime.errors import MissingError, UserError
from storage.files import atomic_file, atomic_folder, write_text

log = logging.getLogger(__name__)

FORMAT = "singularity-model"
VERSION = 1
DESCRIPTION, TENSORS = "model.json", "model.safetensors"
VOCABULARY = VOCABULARIES[0]  # the only one that official files have
RUN_SETTINGS = "config.yaml"  # of a run, with all its settings
OFFICIAL_SUFFIXES = (".pth", ".pt", ".bin")
_SPECIAL_TOKENS = {"pad_id": "[PAD]", "cls_id": "[CLS]", "mask_id": "[MASK]"}


@dataclass(frozen=True)
class Weights:
    """A model on disk: its architecture, its tensors by our names, the ids of its special tokens, inputs, history."""

    config: ModelConfig
    state: dict[str, torch.Tensor]
    special_ids: dict[str, int] = field(default_factory=dict)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    history: History = field(default_factory=History)


def write_weights(weights: Weights, folder: str | Path) -> None:
    """Write `model.safetensors`, then `model.json`, whose presence means that both are complete."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Copies on the CPU: safetensors refuses tensors that share memory.
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.state.items()}
    description = {
        "format": FORMAT,
        "version": VERSION,
        "config": asdict(weights.config),
        "special_ids": weights.special_ids,
        "preprocessing": asdict(weights.preprocessing),
        "history": asdict(weights.history),
        "versions": {name: version(name) for name in ("torch", "timm", "transformers")},
    }
    with atomic_file(folder / TENSORS) as path:
        save_file(state, str(path), metadata={"format": "pt"})
    beside = [path for path in (folder / name for name in (TENSORS, *VOCABULARIES)) if path.is_file()]
    sizes = {path.name: path.stat().st_size for path in beside}
    write_text(folder / DESCRIPTION, json.dumps(description | {"bytes": sizes}, indent=1) + "\n")


def write_folder(weights: Weights, vocabulary: Path | None, folder: Path) -> None:
    """Write a folder of weights and their vocabulary atomically, in place of an earlier one."""
    with atomic_folder(folder) as temporary:
        if vocabulary is not None:
            shutil.copyfile(vocabulary, temporary / vocabulary.name)
        write_weights(weights, temporary)


def find_vocabulary(weights: Path, size: int) -> Path | None:
    """The vocabulary beside what `resolve_weights` found; of an official file a vocab.txt with `size` lines only."""
    if weights.is_dir():
        return vocabulary_in(weights)
    path = weights.parent / VOCABULARY
    return path if path.is_file() and len(path.read_bytes().splitlines()) == size else None


def resolve_weights(path: str | Path) -> Path:
    """The folder or official file that `path` means: itself, a checkpoint's weights, or those of a run folder.

    Of a run the best checkpoint (checkpoints/best) is taken where there is one, otherwise the newest complete one.
    Raises MissingError with the paths that were tried.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix.lower() in OFFICIAL_SUFFIXES:
            return path
        raise UserError(
            f"{path} is not a model: give a folder with {DESCRIPTION}, a run folder, or an official checkpoint (.pth)"
        )
    if not path.exists():
        raise MissingError(
            f"{path} does not exist: give a folder with {DESCRIPTION}, a run folder, or an official checkpoint (.pth)"
        )
    newest = sorted((path / "checkpoints").glob("*_*"), key=lambda found: (len(found.name), found.name), reverse=True)
    best = [found for found in newest if found.name.startswith("best_")] + [path / "checkpoints" / "best"]
    steps = [found for found in newest if found.name.startswith("step_")]
    for folder in (path, *(found / "weights" for found in (path, *best, *steps))):
        if (folder / DESCRIPTION).is_file():
            return folder
    raise MissingError(
        f"{path} has no model: neither {DESCRIPTION}, nor weights/{DESCRIPTION}, nor a complete checkpoint under "
        "checkpoints/; has the run written one yet?"
    )


def read_special_ids(vocabulary: Path) -> dict[str, int]:
    """pad_id, cls_id and mask_id in a vocab.txt, as far as it has them; empty without the file."""
    if not vocabulary.is_file():
        return {}
    lines = vocabulary.read_text(encoding="utf-8", errors="replace").splitlines()
    return {name: lines.index(token) for name, token in _SPECIAL_TOKENS.items() if token in lines}


def weights_fault(folder: Path) -> str:
    """The fault of the files of `write_weights`, for example after a power failure or an incomplete copy; or ""."""
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        sizes = description.get("bytes", {})  # not in what was written before November 2026
    except FileNotFoundError:
        return f"{path} is missing"
    except (ValueError, AttributeError) as error:
        return f"{path} is not valid JSON ({error})"
    for name, size in sizes.items():
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{folder / name} has {found:,} bytes instead of {size:,}"
    vocabulary = folder / VOCABULARY
    if vocabulary.is_file() and read_special_ids(vocabulary).keys() != _SPECIAL_TOKENS.keys():
        return f"{vocabulary} lacks {', '.join(_SPECIAL_TOKENS.values())}"
    return ""


def read_weights(folder: Path) -> Weights:
    """Read what `write_weights` wrote. Raises ValueError, with the file and its fault."""
    path = folder / DESCRIPTION
    if fault := weights_fault(folder):
        raise UserError(f"{fault}: the file is damaged, take another checkpoint")
    description = json.loads(path.read_text())
    if description.get("format") != FORMAT:
        raise UserError(f"{path} does not describe a {FORMAT}: give a folder that training has written")
    if description.get("version") != VERSION:
        raise UserError(
            f"{path} is of version {description.get('version')}, this program reads version {VERSION}: "
            "use the release that wrote it"
        )
    config = config_from_dict(description["config"])
    special_ids = read_special_ids(folder / VOCABULARY) or dict(description.get("special_ids", {}))
    known = description.get("preprocessing")
    preprocessing = Preprocessing.of(known) if known else _run_preprocessing(folder)
    history = History.of(description.get("history", {}))
    return Weights(config, read_tensors(folder / TENSORS), special_ids, preprocessing, history)


def find_run(weights: Path) -> Path | None:
    """The folder of the run whose checkpoint the weights in RUN/checkpoints/NAME/weights are."""
    run = weights.absolute().parents[2] if len(weights.absolute().parents) > 2 else weights
    return run if (run / RUN_SETTINGS).is_file() and weights.absolute().parents[1].name == "checkpoints" else None


def _run_preprocessing(weights: Path) -> Preprocessing:
    """That of the run of a checkpoint of before November 2026, which does not hold its own; else the defaults."""
    if (run := find_run(weights)) is None:
        return Preprocessing()
    try:
        return Preprocessing.of(OmegaConf.to_container(OmegaConf.load(run / RUN_SETTINGS)))  # type: ignore[arg-type]
    except Exception as error:  # of many kinds: YAML, OmegaConf, a value of another type
        reason = " ".join(str(error).split())[:150]
        log.warning("%s cannot be read (%s): taking default preprocessing", run / RUN_SETTINGS, reason)
        return Preprocessing()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file. Raises FileNotFoundError, or ValueError when it is truncated or no such file."""
    if not path.is_file():
        raise MissingError(f"{path} is missing: the checkpoint is incomplete, take another one")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise UserError(
            f"{path} cannot be read ({error}): it is truncated or not a safetensors file; copy it again"
        ) from None
