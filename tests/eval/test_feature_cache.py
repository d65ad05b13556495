"""Encoded visuals on disk: read back as they were, by any number of processes, and only where they are the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eval import cache
from eval.cache import Block, CachedBlocks, read_entry, write_entry
from eval.config import EvalConfig
from eval.tasks.retrieval import RetrievalTask
from runtime.ranks import ALONE, Ranks
from tests.eval.small import Drawn, Words, small_model


def blocks(count=7, dtype=torch.float32, embeddings=True):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(count, 2, 5, 8, generator=generator).to(dtype)
    rows = torch.randn(count, 4, generator=generator)
    return [
        Block(np.arange(count)[part], tokens[part], rows[part] if embeddings else None)
        for part in (slice(0, 3), slice(3, 4), slice(4, count))
    ]


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Files of two blocks."""
    monkeypatch.setattr(cache, "FILE_BYTES", 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_written_is_read_by_any_number_of_processes(tmp_path, dtype):
    written = blocks(dtype=dtype)
    write_entry(tmp_path / "entry", iter(written), 7, 2, ALONE)
    (whole,) = read_entry(tmp_path / "entry", 7, 7, ALONE)
    for world_size in (1, 2, 3, 9):
        shares = [CachedBlocks(written, 2, Ranks(rank, world_size)) for rank in range(world_size)]
        assert sorted(i for share in shares for block in share for i in block.indices) == list(range(7))
        for block in (block for share in shares for block in share):
            assert len(block.indices) <= 2
            assert len({*(block.indices % world_size)}) == 1
            assert torch.equal(block.tokens, whole.tokens[block.indices])
            assert torch.equal(block.embeddings, whole.embeddings[block.indices])


def test_models_without_embeddings_have_none(tmp_path):
    found = write_entry(tmp_path / "entry", blocks(embeddings=False), 7, 4, ALONE)
    assert all(block.embeddings is None for block in found)


def test_files_hold_many_blocks_because_a_process_maps_few_files(tmp_path, monkeypatch):
    many = [Block(np.array([number]), torch.zeros(1, 2, 5, 8), None) for number in range(100)]
    write_entry(tmp_path / "entry", many, 100, 4, ALONE)
    assert len(list((tmp_path / "entry").iterdir())) == 100
    monkeypatch.undo()
    write_entry(tmp_path / "other", many, 100, 4, ALONE)
    assert len(list((tmp_path / "other").iterdir())) == 1


def test_an_entry_is_complete_or_absent(tmp_path):
    def failing():
        yield from blocks()[:2]
        raise RuntimeError("the job was killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_entry(tmp_path / "entry", failing(), 7, 2, ALONE)
    assert list(tmp_path.iterdir()) == []
    assert read_entry(tmp_path / "entry", 7, 2, ALONE) is None


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1], lambda data: bytes(len(data)), None])
def test_an_entry_that_a_power_cut_has_damaged_is_made_again(tmp_path, caplog, damage):
    write_entry(tmp_path / "entry", blocks(), 7, 2, ALONE)
    path = tmp_path / "entry/0000-000001.safetensors"
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    assert read_entry(tmp_path / "entry", 7, 2, ALONE) is None
    assert "entry is damaged" in caplog.text
    write_entry(tmp_path / "entry", blocks(), 7, 2, ALONE)
    assert read_entry(tmp_path / "entry", 7, 2, ALONE) is not None


def test_visuals_that_could_not_be_read_are_tried_again(tmp_path, caplog):
    found = write_entry(tmp_path / "entry", blocks()[:2], 7, 2, ALONE)
    assert [block.indices.tolist() for block in found] == [[0, 1], [2, 3]]  # good for this evaluation
    assert list(tmp_path.iterdir()) == []
    assert "3 visuals are unreadable" in caplog.text


def evaluate(config, model=None, dataset=None):
    return RetrievalTask().evaluate(model or small_model(), dataset or Drawn(), Words(), config, 2)


def test_an_evaluation_from_disk_equals_the_first_one_and_decodes_nothing(tmp_path):
    config = EvalConfig(k_test=5, feature_cache=str(tmp_path))
    plain = evaluate(EvalConfig(k_test=5))
    first = evaluate(config)
    unreadable = Drawn()
    unreadable.batches = None  # never asked for
    second = evaluate(config, dataset=unreadable)
    for result in (first, second):
        assert result.metrics == plain.metrics
        np.testing.assert_allclose(result.scores.visual_to_text, plain.scores.visual_to_text, atol=1e-5)
    np.testing.assert_array_equal(first.scores.similarity, second.scores.similarity)


def test_anything_that_changes_the_features_makes_another_entry(tmp_path):
    config = EvalConfig(k_test=2, feature_cache=str(tmp_path))
    evaluate(config)
    evaluate(replace(config, k_test=4))
    assert len(list(tmp_path.iterdir())) == 1
    evaluate(config, model=small_model(seed=1))
    other = Drawn()
    other.digest = "another corpus"
    evaluate(config, dataset=other)
    evaluate(replace(config, eval_frame_ensemble="mean"))
    RetrievalTask().evaluate(small_model(), Drawn(), Words(), config, 1)
    assert len(list(tmp_path.iterdir())) == 5
    evaluate(replace(config, eval_frame_ensemble="lse"))  # the same frames, each by itself
    assert len(list(tmp_path.iterdir())) == 5
