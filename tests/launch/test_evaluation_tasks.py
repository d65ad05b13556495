"""All kinds of evaluation as a user starts them: the same files whatever the number of processes and batch sizes."""

import json

import numpy as np
import pytest
from small_run import job, run, run_jobs

from model.checkpoints.loading import save_model
from model.config import LossWeights
from model.singularity import Singularity
from model.vqa import SingularityQA
from preprocessing.text import Tokenizer
from tests.eval.small import small_model

pytestmark = pytest.mark.timeout(400)

SPLITS = "motion: CORPORA/clips_test_motion", "images: CORPORA/images_test"
TASKS = {
    "retrieval": ("retrieval", f"k_test: 9\ntest_corpus: {{{', '.join(SPLITS)}}}\n"),
    "qa": ("qa", "task: qa\ntest_corpus: {test: CORPORA/qa_test}\nanswer_list: DRAWN/answer_list.json\nk_test: 7\n"),
    "choice": ("retrieval", "task: choice\ntest_corpus: {test: CORPORA/mc_test}\n"),
}  # fmt: skip
COMMON = "video_input: {num_frames_test: 3}\nprecision: fp32\nmax_txt_l: {image: 24, video: 24}\n"


@pytest.fixture(scope="module")
def checkpoints(shapes, tmp_path_factory):
    """Folder with a model for retrieval and one for questions, of random weights that tell every pair apart."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer = Tokenizer.load(str(shapes.vocab))
    for name, kind in (("retrieval", Singularity), ("qa", SingularityQA)):
        model = small_model(tokenizer, kind, loss_weight=LossWeights(mlm=0.0))
        save_model(model, model.config, folder / name)
        tokenizer.save(folder / name)
    return folder


def recipe_of(task, shapes, folder):
    recipe = folder / f"{task}.yaml"
    text = TASKS[task][1].replace("CORPORA", str(shapes.shards)).replace("DRAWN", str(shapes.folder))
    recipe.write_text(COMMON + text)
    return recipe


def evaluated(task, shapes, checkpoints, folder, *settings, processes=1):
    """Evaluate into `folder` and return it."""
    where = (f"checkpoint={checkpoints / TASKS[task][0]}", f"output_dir={folder}")
    result = run("evaluate", recipe_of(task, shapes, folder.parent), *where, *settings, processes=processes)
    assert result.returncode == 0, result.stderr + result.stdout
    return folder


def assert_equal_predictions(first, second):
    """The same files with the same items in the same order, scores but for the last digits."""
    if isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_equal_predictions(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second):
            assert_equal_predictions(one, other)
    elif isinstance(first, float):
        assert first == pytest.approx(second, abs=2e-4)
    else:
        assert first == second


def assert_same_results(first, second):
    one, other = (next(folder.glob("evaluation/*/evaluation.json")).parent for folder in (first, second))
    for name in ("metrics.json", "predictions.json"):
        assert_equal_predictions(json.loads((one / name).read_text()), json.loads((other / name).read_text()))
    assert (one / "metrics.json").read_bytes() == (other / "metrics.json").read_bytes()
    assert (one / "outcomes.parquet").read_bytes() == (other / "outcomes.parquet").read_bytes()
    if (one / "submission").is_dir():
        assert (one / "submission/test.json").read_bytes() == (other / "submission/test.json").read_bytes()
    if (one / "scores.npz").is_file():
        with np.load(one / "scores.npz") as scores, np.load(other / "scores.npz") as others:
            assert list(scores) == list(others)
            for name in scores:
                np.testing.assert_allclose(scores[name], others[name], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def evaluations(shapes, checkpoints, tmp_path_factory):
    """Folder with evaluations of every task by one process, and by three with other batch sizes."""
    folder = tmp_path_factory.mktemp("evaluations")
    sizes = ("batch_size_test.video=5", "batch_size_test.image=3", "pair_batch_size=24")
    for name, processes, settings in (("alone", 1, ()), ("three", 3, sizes)):
        jobs = []
        for task, (weights, _) in TASKS.items():
            where = f"checkpoint={checkpoints / weights}", f"output_dir={folder / name / task}"
            jobs.append(job("evaluate", recipe_of(task, shapes, folder), *where, *settings))
        run_jobs(folder, jobs, processes)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_three_processes_give_the_files_of_one(task, evaluations):
    alone = evaluations / "alone" / task
    assert_same_results(alone, evaluations / "three" / task)
    assert (alone / "report.html").is_file()
    metrics = json.loads((alone / "metrics.json").read_text())
    expected = {"retrieval": ["motion/", "motion_emb/", "images/", "images_emb/"]}.get(task, ["test"])
    assert list(metrics) == expected


def test_several_numbers_of_frames_in_one_run(shapes, checkpoints, tmp_path):
    settings = ("eval_num_frames=[1,2,4]", f"feature_cache={tmp_path / 'features'}")
    first = evaluated("retrieval", shapes, checkpoints, tmp_path / "first", *settings)
    labels = {path.parent.name for path in first.glob("evaluation/*/evaluation.json")}
    assert labels == {"1_frame", "2_frames", "4_frames"}
    four = (first / "evaluation/4_frames/metrics.json").read_bytes()
    assert (first / "metrics.json").read_bytes() == four
    assert "motion, mean of R@1, 5, 10, text to clip" in (first / "report.html").read_text()
    # What is kept on disk serves other processes and gives the same; images have one frame and are kept once.
    assert len(list((tmp_path / "features").iterdir())) == 4
    settings = ("video_input.num_frames_test=4", f"feature_cache={tmp_path / 'features'}", "label=4_frames")
    again = evaluated("retrieval", shapes, checkpoints, tmp_path / "again", *settings, processes=2)
    assert (again / "metrics.json").read_bytes() == four
    assert len(list((tmp_path / "features").iterdir())) == 4


def test_a_checkpoint_of_another_task_is_refused(shapes, checkpoints, tmp_path):
    for task, weights, settings, message in (
        ("choice", "qa", [], "is a question-answering model"),
        ("qa", "qa", [f"answer_list={tmp_path}/none.json"], "none.json does not exist"),
        ("qa", "qa", [f"test_corpus={{test: {shapes.url('mc_test')}}}"], "has no questions, which task=qa needs"),
    ):
        where = f"checkpoint={checkpoints / weights}", f"output_dir={tmp_path / 'run'}"
        result = run("evaluate", recipe_of(task, shapes, tmp_path), *where, *settings, processes=1)
        assert result.returncode == 2
        assert message in result.stderr
