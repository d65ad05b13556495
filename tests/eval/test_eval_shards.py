"""Retrieval evaluation of packed Shapes by the real loader and tokenizer, up to the report."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.config import EvalConfig
from eval.outputs import write_evaluation
from eval.report.evaluations import find_evaluations
from eval.report.page import write_report
from eval.report.tables import console_table
from eval.tasks.retrieval import RetrievalTask
from loaders.config import LoaderConfig, PerMedia
from loaders.evaluation import RetrievalSet
from model.config import TemporalConfig
from sharding.shards.schema import read_corpus, read_index
from tests.eval.small import small_model

TASK = RetrievalTask()
LOADER = LoaderConfig(image_res=32, max_txt_l=PerMedia(24, 24))
CONFIG = EvalConfig(k_test=8, gallery=3, batch_size_test=PerMedia(8, 8))


@pytest.fixture(scope="module")
def model(tokenizer):
    temporal = TemporalConfig(enable=True, num_layers=1)
    return small_model(tokenizer, temporal_vision_encoder=temporal, add_temporal_embed=True, num_frames=4)


def test_one_and_four_frames_of_packed_clips_up_to_the_report(shapes, model, tokenizer, tmp_path):
    names = ("images_test", "clips_test_motion")
    for frames in (1, 4):
        datasets = [RetrievalSet(shapes.url(name), LOADER) for name in names]
        results = [TASK.evaluate(model, dataset, tokenizer, CONFIG, frames) for dataset in datasets]
        outputs = [TASK.output(result, dataset, CONFIG) for result, dataset in zip(results, datasets)]
        write_evaluation(tmp_path / "run" / "evaluation" / f"{frames}_frames", outputs, CONFIG)
        for dataset in datasets:
            dataset.close()
    evaluations = find_evaluations([tmp_path / "run"])
    assert [set(e.metrics) for e in evaluations] == [{f"{n}{e}/" for n in names for e in ("", "_emb")}] * 2
    one, four = (np.load(e.folder / "scores.npz") for e in evaluations)
    np.testing.assert_allclose(one["images_test/i2t_x"], four["images_test/i2t_x"], atol=1e-5)
    assert np.abs(one["clips_test_motion/i2t_emb"] - four["clips_test_motion/i2t_emb"]).max() > 1e-6
    gallery = evaluations[0].gallery["clips_test_motion"]
    assert all(visual["frames"] == CONFIG.gallery_frames for visual in gallery["visuals"].values())
    for path in (evaluations[0].folder / "thumbnails").glob("clips_*"):
        with Image.open(io.BytesIO(path.read_bytes())) as picture:
            assert picture.width == CONFIG.gallery_frames * picture.height
    assert "4_frames: clips_test_motion" in console_table(evaluations)


def damage(url: str, sample: int) -> None:
    """Overwrite the middle of a packed sample's first frame."""
    corpus = read_corpus(url)
    row = read_index(corpus, 0).slice(sample, 1).to_pylist()[0]
    with open(Path(url) / corpus.shards[0].name, "r+b") as file:
        file.seek(row["offsets"][0] + row["sizes"][0] // 2)
        file.write(b"\0" * 40)


def test_a_damaged_sample_is_listed_and_the_others_keep_their_scores(shapes, model, tokenizer, tmp_path):
    url = str(tmp_path / "images_test")
    shutil.copytree(shapes.url("images_test"), url)
    damage(url, 5)
    whole, damaged = RetrievalSet(shapes.url("images_test"), LOADER), RetrievalSet(url, LOADER)
    first, second = (TASK.evaluate(model, dataset, tokenizer, CONFIG, 1) for dataset in (whole, damaged))
    assert list(second.missing) == [5]
    others = np.arange(whole.num_visuals) != 5
    np.testing.assert_allclose(first.scores.similarity[others], second.scores.similarity[others], atol=1e-5)
    folder = write_evaluation(tmp_path / "label", [TASK.output(second, damaged, CONFIG)], CONFIG)
    missing = json.loads((folder / "evaluation.json").read_text())["splits"]["images_test"]["missing"]
    assert list(missing) == [damaged.sources[5]]
    shutil.rmtree(url)
    page = write_report([folder.rename(tmp_path / "moved")], tmp_path / "report.html").read_text()  # without the corpus
    assert damaged.sources[5] in page
    assert "data:image/jpeg" in page
