"""Writes a run's metrics: metrics.jsonl, the console, Weights & Biases and TensorBoard if enabled."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import time
import uuid
from pathlib import Path
from typing import Any

from runtime.errors import UserError, file_errors
from runtime.settings import flatten
from runtime.units import duration
from storage.files import write_text
from train.config.settings import RunConfig
from train.folder import RunFolder

log = logging.getLogger(__name__)

WANDB_PICTURES = 12  # pictures of one evaluation sent to Weights & Biases


def check_tracking(run: RunConfig) -> None:
    """Raise ValueError if Weights & Biases or TensorBoard is enabled and not installed."""
    for setting, enabled in {"wandb.enable": run.wandb.enable, "tensorboard": run.tensorboard}.items():
        package = setting.partition(".")[0]
        if enabled and importlib.util.find_spec(package) is None:
            remedy = f"pip install {package}, or {setting}=false"
            raise UserError(f"{setting} is true and {package} is not installed: {remedy}")


class Tracker:
    """Writes a run's metrics; only rank 0 has one.

    When a run resumes, lines of later steps are removed from metrics.jsonl.
    """

    def __init__(
        self, folder: RunFolder, run: RunConfig, total_steps: int, step: int, evaluated_epochs: int = 0
    ) -> None:
        self._total_steps, self._path = total_steps, folder.metrics
        self._first_step, self._started = step, time.perf_counter()
        weights = {**({} if run.task == "qa" else vars(run.loss_weight)), **run.losses}
        weights = {f"loss_{name}": weight for name, weight in weights.items() if weight not in (0, 1)}
        if weights:
            factors = ", ".join(f"{name} x {weight:g}" for name, weight in weights.items())
            log.info("Logged losses are multiplied by their weights: %s; loss is their sum", factors)
        drop_after(self._path, step, evaluated_epochs)
        self._file = self._path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(folder, run) if run.wandb.enable else None
        self._board: Any = None
        if run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Entries after `step` are hidden: those steps are trained again.
            self._board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)

    def step(self, metrics: dict[str, Any]) -> None:
        """Record a training step's metrics; `metrics["step"]` is its number."""
        self._write(metrics)
        log.info("%s | %s left", step_line(metrics, self._total_steps), self._time_left(metrics["step"]))

    def evaluation(
        self, step: int, epoch: int, metrics: dict[str, dict[str, float]], folder: Path | None = None
    ) -> None:
        """Record an evaluation's metrics, named SPLIT/METRIC; to Weights & Biases also its report and pictures."""
        flat = {f"{split.rstrip('/')}/{name}": value for split, row in metrics.items() for name, value in row.items()}
        label = {"evaluation": folder.name} if folder is not None else {}
        self._write({"step": step, "epoch": epoch, **label, **flat})
        if self._wandb is not None and folder is not None:
            self._wandb.log(_report(folder), step=step)

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            self._board.close()

    def _write(self, metrics: dict[str, Any]) -> None:
        not_finite = (key for key, value in metrics.items() if isinstance(value, float) and not math.isfinite(value))
        metrics = {**metrics, **dict.fromkeys(not_finite)}  # null: JSON has no word for NaN
        with file_errors(self._path):
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in metrics.items() if key != "step"}, step=metrics["step"])
        if self._board is not None:
            for key, value in metrics.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(key, value, metrics["step"])
            self._board.flush()

    def _time_left(self, step: int) -> str:
        seconds_per_step = (time.perf_counter() - self._started) / (step - self._first_step)
        return duration(seconds_per_step * (self._total_steps - step))


def _report(folder: Path) -> dict[str, Any]:
    """An evaluation's page and the first of its pictures, for Weights & Biases."""
    import wandb

    pictures = sorted(folder.glob("thumbnails/*.jpg"))[:WANDB_PICTURES]
    found: dict[str, Any] = {"pictures": [wandb.Image(str(path), caption=path.stem) for path in pictures]}
    if (folder / "report.html").is_file():
        found["report"] = wandb.Html((folder / "report.html").read_text(encoding="utf-8"), inject=False)
    return {f"{folder.name}/{name}": value for name, value in found.items() if value}


def step_line(metrics: dict[str, Any], total_steps: int) -> str:
    """One line for the console about a training step."""
    losses = " ".join(f"{name[5:]} {value:.3f}" for name, value in metrics.items() if name.startswith("loss_"))
    norm = metrics["grad_norm"]
    parts = [
        f"step {metrics['step']}/{total_steps} epoch {metrics['epoch']} {metrics['media_type']}",
        f"loss {metrics['loss']:.3f} ({losses})",
        f"lr {metrics['lr']:.2e}",
        *([f"temp {metrics['temperature']:.4f}"] if metrics["temperature"] is not None else []),
        *([f"grad {norm:.2f}"] if norm is not None else []),
        *([f"scale {metrics['grad_scale']:.0f}"] if "grad_scale" in metrics else []),
        f"{metrics['samples_per_second']:.0f}/s",
        f"wait {100 * metrics['data_wait']:.0f}%",
        f"{metrics['memory_gb']:.1f} GB",
        *([f"MFU {100 * metrics['mfu']:.1f}%"] if metrics["mfu"] is not None else []),
        *([f"skipped {metrics['skipped']}"] if metrics.get("skipped") else []),
    ]
    return " | ".join(parts)


def drop_after(path: Path, step: int, evaluated_epochs: int = 0) -> None:
    """Remove the lines of a metrics.jsonl after `step`, and an incomplete last line.

    Evaluations after `evaluated_epochs` are removed too, because they will run again.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            metrics = json.loads(line)
            repeated = "evaluation" in metrics and evaluated_epoch(metrics["evaluation"]) > evaluated_epochs
            if metrics["step"] <= step and not repeated:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_text(path, "".join(kept))


def evaluated_epoch(label: str) -> float:
    """The epoch after which an evaluation `epoch_XX` was made; infinity for the final evaluation."""
    return int(label[6:]) if label.startswith("epoch_") else math.inf


def _start_wandb(folder: RunFolder, run: RunConfig) -> Any:
    import wandb

    identity = folder.path / "wandb_id.txt"
    if not identity.is_file():
        identity.write_text(uuid.uuid4().hex[:12])
    return wandb.init(
        project=run.wandb.project,
        entity=run.wandb.entity,
        mode=run.wandb.mode,  # type: ignore[arg-type]
        dir=str(folder.path),
        name=folder.path.name,
        id=identity.read_text().strip(),
        resume="allow",
        config=flatten(run),
    )
