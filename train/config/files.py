"""Reads a run's YAML with its bases and `key=value` overrides into a checked RunConfig, and writes it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from runtime.settings import build, explicit_values, read_layers
from train.config.settings import RunConfig


@dataclass(frozen=True)
class Settings:
    """A checked configuration, and which of its dotted keys the user has set (others have their defaults)."""

    config: RunConfig
    explicit: frozenset[str]


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """The configuration of the YAML at `path` and `key=value` overrides; raises as `read_layers` and `build`."""
    given = read_layers(RunConfig, path, overrides)
    return Settings(build(RunConfig, given), frozenset(key for key, _ in explicit_values(RunConfig, given)))


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML, which `load_settings` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
