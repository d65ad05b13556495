"""Fixtures of this folder."""

import pytest
import torch

from model.checkpoints.files import Weights, write_weights
from train.checkpoints import writing


@pytest.fixture
def tiny(monkeypatch):
    """Checkpoints of an engine whose only weight is `engine.weight`; the files are written as usual."""

    def shard(folder, engine, ranks, moments=True):
        path = folder / "rank_00000_of_00001.safetensors"
        path.write_text(str(engine.weight))
        return path

    def whole(folder, engine, config, tokenizer, preprocessing, history):
        state = {"step": torch.tensor(engine.weight)}
        write_weights(Weights(config, state, history=history), folder / "weights")

    monkeypatch.setattr(writing, "write_shard", shard)
    monkeypatch.setattr(writing, "_write_whole_weights", whole)
    monkeypatch.setattr(writing, "_optimizer_state", lambda engine: {})
    monkeypatch.setattr(writing, "flush", lambda *paths: None)
