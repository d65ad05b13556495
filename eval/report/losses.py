"""Reads a run's metrics.jsonl for charts, and names its losses with their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

MEDIA = {"image": "images", "video": "clips"}
TOTAL = "loss"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one cut short by an interruption is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def loss_weights(run: Path) -> dict[str, float]:
    """The weights in a run's config.yaml that are neither 1 nor 0, as {"loss_itc": 2.0}; empty where it has none."""
    try:
        settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        named = {**settings["loss_weight"], **settings.get("losses", {})}
        weights = {f"loss_{name}": float(value) for name, value in named.items()}
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        return {}
    return {name: weight for name, weight in weights.items() if weight not in (0, 1)}


def weighted_name(metric: str, weights: Mapping[str, float], name: str | None = None) -> str:
    """The name of a loss in a chart: with its weight where it has one, the total as a weighted sum.

    name: by default as in metrics.jsonl.
    """
    name = name or metric
    if metric == TOTAL and weights:
        return f"{name} (weighted sum)"
    return f"{name} (x {weights[metric]:g})" if metric in weights else name


def by_medium(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The training steps of a metrics.jsonl by the medium of their batch: "images", "clips", or "" where unknown.

    Lines of evaluations are left out.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for step in steps:
        if TOTAL in step:
            medium = step.get("media_type")
            found.setdefault(MEDIA.get(str(medium), str(medium or "")), []).append(step)
    return found
