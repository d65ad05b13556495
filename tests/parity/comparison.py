"""A recorded case: its files, and the largest deviation of our numbers from the recorded ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.checkpoints.files import VOCABULARY, read_special_ids
from model.checkpoints.loading import load_model
from preprocessing.text import Tokenizer

RTOL, ATOL = 1e-4, 2e-4
LOSS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-3  # of the tensor's largest entry
LOSS_NAMES = {"ita": "itc", "itm": "itm", "mlm": "mlm"}  # the official code's and ours


def as_array(value: Any) -> np.ndarray:
    """A tensor, array or number as a float64 array, in which integers are exact."""
    return np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value, dtype=np.float64)


@dataclass
class Comparison:
    """The deviations of one case. `worst` is relative to what is allowed: above 1 the case fails."""

    case: str
    count: int = 0
    largest: float = 0.0  # absolute deviation
    worst: float = 0.0
    worst_of: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether anything was compared and all of it is within tolerance."""
        return self.count > 0 and self.worst <= 1

    def close(self, name: str, ours: Any, expected: Any, rtol: float = RTOL, atol: float = ATOL) -> None:
        """Compare arrays entry by entry: |ours - expected| <= atol + rtol |expected|."""
        ours, expected = as_array(ours), as_array(expected)
        self.count += 1
        if ours.shape != expected.shape:
            self._keep(name, float("inf"), float("inf"))
            self.notes.append(f"{name}: shape {ours.shape}, expected {expected.shape}")
            return
        if not ours.size:
            return
        deviation = np.nan_to_num(np.abs(ours - expected), nan=np.inf)
        self._keep(name, float(deviation.max()), float((deviation / (atol + rtol * np.abs(expected))).max()))

    def loss(self, name: str, ours: Any, expected: Any, relative: bool = False) -> None:
        """Compare a loss; `relative` for losses of a temperature at its lower end."""
        rtol, atol = (LOSS_TOLERANCE, 0.0) if relative else (0.0, LOSS_TOLERANCE)
        self.close(name, ours, expected, rtol, atol)

    def gradient(self, name: str, ours: Any, expected: Any, scale: float | None = None) -> None:
        """Compare a gradient, in units of its largest entry or of `scale`."""
        expected = as_array(expected)
        scale = float(np.abs(expected).max(initial=0)) if scale is None else scale
        scale = scale or 1.0
        self.close(name, as_array(ours) / scale, expected / scale, rtol=0.0, atol=GRADIENT_TOLERANCE)

    def equal(self, name: str, ours: Any, expected: Any) -> None:
        """Compare anything that must be the same."""
        same = (
            np.array_equal(as_array(ours), as_array(expected))
            if isinstance(ours, torch.Tensor | np.ndarray)
            else ours == expected
        )
        self.count += 1
        if not same:
            self._keep(name, float("inf"), float("inf"))
            self.notes.append(f"{name} is not the same")

    def _keep(self, name: str, deviation: float, ratio: float) -> None:
        self.largest = max(self.largest, deviation)
        if ratio > self.worst:
            self.worst, self.worst_of = ratio, name


def as_lists(truth: Any) -> list[list[int]]:
    """The true items of each query: recorded as a list or by number as text, each a number or a list of numbers."""
    rows = truth if isinstance(truth, list) else [truth[str(query)] for query in range(len(truth))]
    return [row if isinstance(row, list) else [row] for row in rows]


class Case:
    """The recorded files of one case folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkpoint = folder, folder / "ckpt.pth"
        self.vocabulary = folder.parent / VOCABULARY  # which the cases of a folder share
        self.inputs = self._tensors("inputs.npz")
        self.expected = self._tensors("expected.npz")

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        path = self.folder / name
        if not path.is_file():
            return {}
        with np.load(path) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].dtype.kind in "fi"}

    def json(self, name: str) -> Any:
        """The content of a JSON file of the case."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def load(self) -> Any:
        """The model of the checkpoint, with the special tokens of the shared vocabulary where there is one."""
        return load_model(self.checkpoint, special_ids=read_special_ids(self.vocabulary))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the shared vocabulary."""
        return Tokenizer.load(str(self.vocabulary))
