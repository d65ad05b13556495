"""The study on clips of one's own: its annotations, intervals and table, and its commands on a few clips of Shapes."""

import json
import math
import os
import shutil
import subprocess
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import ROOT

from eval.config import EvalConfig
from eval.outputs import write_evaluation
from eval.tasks.retrieval import RetrievalTask
from launch.study_clips import (
    SHOWN,
    Shares,
    explanation,
    kind_of,
    read_shares,
    retrieved,
    sign_test,
    table,
    wilson,
    write_annotations,
)
from model.checkpoints.loading import save_model
from model.config import LossWeights
from model.history import History
from preprocessing.frames import choose_frames
from runtime.errors import UserError
from tests.eval.report.test_eval_report import Pictured
from tests.eval.small import Words, small_model

MOTION = "sign_*.mkv sign_*#1"


@given(st.integers(1, 500), st.data())
def test_an_interval_holds_the_share_is_never_empty_and_mirrors(count, data):
    right = data.draw(st.integers(0, count))
    low, high = wilson(right / count, count)
    assert 0 <= low <= right / count <= high <= 1
    assert high - low > 1 / (count + 4)
    other_low, other_high = wilson(1 - right / count, count)
    assert (low, high) == (pytest.approx(1 - other_high), pytest.approx(1 - other_low))
    wider = wilson(right / count, max(1, count // 4))
    assert wider[1] - wider[0] >= high - low - 1e-12


@pytest.mark.parametrize("count", [17, 35, 77])
def test_95_of_100_intervals_hold_the_true_share(count):
    def coverage(share):
        chances = [math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(count + 1)]
        held = [low <= share <= high for low, high in (wilson(k / count, count) for k in range(count + 1))]
        return sum(chance for chance, inside in zip(chances, held) if inside)

    found = [coverage(share) for share in np.linspace(0.05, 0.95, 91)]
    assert np.mean(found) == pytest.approx(0.95, abs=0.01)
    assert min(found) > 0.9


@pytest.mark.parametrize("total", [0, 1, 5, 6, 9])
def test_the_sign_test_counts_all_outcomes_that_are_as_unequal(total):
    outcomes = [sum(signs) for signs in product((0, 1), repeat=total)]
    for wins in range(total + 1):
        as_unequal = [abs(2 * each - total) >= abs(2 * wins - total) for each in outcomes]
        assert sign_test(wins, total - wins) == pytest.approx(np.mean(as_unequal))


def test_shuffled_frames_are_those_of_middle_in_another_order():
    for length, wanted in product(range(2, 60), (2, 4, 8)):
        shown, plain = (choose_frames(kind, wanted, length, 4.0) for kind in ("shuffled", "middle"))
        count = min(length, wanted)
        assert sorted(shown[:count]) == plain[:count].tolist()
        assert shown[:count].tolist() != plain[:count].tolist()
    assert choose_frames("shuffled", 1, 9, 4.0) == choose_frames("middle", 1, 9, 4.0)


@pytest.fixture
def folder(tmp_path):
    """Two training clips and three others, one of them without a question."""
    folder = tmp_path / "mine"
    names = ["sign_a.mkv", "boat.mp4", "sign_b.mkv", "dog.mp4", "cat.mp4"]
    for name in names:
        path = folder / ("signs" if name.startswith("sign") else "others") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    captions = [{"video": name, "caption": f"this is {name}"} for name in names]
    asked = [
        {"image": name, "question": word, "answer": "yes", "question_id": f"{name}#{number}"}
        for name in names[:4]
        for number, word in enumerate(("what", "which"))
    ]
    texts = {"my_train.json": captions[:2], "rest.json": captions[2:], "qa.json": asked, "answers.json": ["yes", "no"]}
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def test_annotations_are_sorted_by_use_and_kind(folder, tmp_path):
    write_annotations([folder], MOTION, tmp_path / "out")
    rows = {
        name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("every", "train", "held_out")
    }
    clips = {name: {row["video"] for row in each} for name, each in rows.items()}
    assert clips["train"] == {"signs/sign_a.mkv", "others/boat.mp4"}
    assert clips["held_out"] == {"signs/sign_b.mkv", "others/dog.mp4", "others/cat.mp4"}
    assert clips["every"] == clips["train"] | clips["held_out"]
    kinds = {row["question_id"]: row["question_type"] for row in rows["every"] if "question" in row}
    assert {name for name, kind in kinds.items() if kind == "motion"} == {"sign_a.mkv#1", "sign_b.mkv#1"}
    assert len(kinds) == 8
    about = {name: (tmp_path / "out" / name).read_text() for name in ("media_root", "questions", "motion")}
    assert about == {"media_root": str(folder), "questions": "yes", "motion": MOTION}
    assert [kind_of(name, MOTION) for name in ("sign_a.mkv", "boat.mp4")] == ["motion", "appearance"]
    assert kind_of("sign_a.mkv", "") == ""


def test_clips_that_are_missing_are_named_and_without_training_clips_all_are_tested(folder, tmp_path):
    (folder / "others" / "dog.mp4").unlink()
    with pytest.raises(UserError, match=r"dog.mp4 is not below .*mine: put the clip there"):
        write_annotations([folder], MOTION, tmp_path / "out")
    for name in ("rest.json", "qa.json"):
        (folder / name).unlink()
    (folder / "my_train.json").rename(folder / "mine.json")
    write_annotations([folder], "", tmp_path / "all")
    assert [path.name for path in (tmp_path / "all").glob("*.json")] == ["every.json"]
    (folder / "mine.json").unlink()
    with pytest.raises(UserError, match="no JSON list"):
        write_annotations([folder], "", tmp_path / "none")


def test_clips_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "1.mp4").touch()
    named = [{"video": f"{part}/1.mp4", "caption": f"clip of {part}"} for part in ("a", "b")]
    (tmp_path / "mine.json").write_text(json.dumps(named))
    write_annotations([tmp_path], "", tmp_path / "out")
    rows = json.loads((tmp_path / "out/every.json").read_text())
    assert {row["video"]: row["caption"] for row in rows} == {"a/1.mp4": "clip of a", "b/1.mp4": "clip of b"}
    (tmp_path / "mine.json").write_text(json.dumps([{"video": "elsewhere/1.mp4", "caption": "a clip"}]))
    with pytest.raises(UserError, match=r"elsewhere/1.mp4 may be .*a/1.mp4 or .*b/1.mp4: give the path below"):
        write_annotations([tmp_path], "", tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "said"),
    [("[", "is not JSON"), ('[{"video": "1.mp4", "question": "what"}]', "a question about 1.mp4 has no answer")],
)
def test_annotations_that_cannot_be_read_are_one_line(tmp_path, content, said):
    (tmp_path / "1.mp4").touch()
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(UserError, match=said):
        write_annotations([tmp_path], "", tmp_path / "out")


class Clips(Pictured):
    """The drawn clips as the study's test set; every third one is of motion."""

    def __init__(self):
        super().__init__(shared=False, name="clips")
        self.sources = [f"sub/{'sign' if i % 3 == 0 else 'thing'}_{i:02}.mkv" for i in range(self.num_visuals)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder of a study whose checkpoint was evaluated; its validation preferred the dual encoder."""
    folder, task = tmp_path_factory.mktemp("study"), RetrievalTask()
    (folder / "annotations").mkdir()
    (folder / "annotations" / "motion").write_text(MOTION)
    model, config = small_model(), EvalConfig(gallery=0)
    model.history = History(reranks=False)
    for number, label in enumerate(SHOWN):
        result = task.evaluate(model, Clips(), Words(), config, 1 + number % 2)
        output = task.output(result, Clips(), config)
        write_evaluation(folder / "given" / "evaluation" / label, [output], config)
    return folder


def test_the_shares_are_the_recalls_of_the_evaluation_and_those_within_a_kind(study):
    shares = {share.title: share for share in read_shares(study)}
    assert list(shares) == [f"as given: {name}" for name in ("all", "all, R@5", "appearance", "motion")]
    clips = Clips()
    assert [share.count for share in shares.values()] == [13, 13, 8, 5]
    for label in SHOWN:
        metrics = json.loads((study / "given/evaluation" / label / "metrics.json").read_text())["clips_emb/"]
        for name, metric in (("all", "img_r1"), ("all, R@5", "img_r5")):
            weights = [len(texts) for texts in clips.texts_of_visual]
            right = np.average(shares[f"as given: {name}"].right[label], weights=weights)
            assert 100 * right == pytest.approx(metrics[metric], abs=0.01)
    assert shares["as given: motion"].chance == pytest.approx(20)
    assert shares["as given: appearance"].chance == pytest.approx(12.5)
    with np.load(study / "given/evaluation/4_frames/scores.npz") as scores:
        reranked, similarity = scores["clips/t2i_x"], scores["clips/i2t_emb"].T
    for matrix, reranks in ((reranked, True), (similarity, False)):
        motion = [i for i in range(13) if i % 3 == 0]
        texts = [number for number, (clip,) in enumerate(clips.visuals_of_text) if clip in motion]
        best = [
            motion[row.argmax()] == clips.visuals_of_text[text][0] for text in texts for row in [matrix[text, motion]]
        ]
        found = retrieved(study / "given/evaluation/4_frames", MOTION, reranks)["motion"]
        assert np.average(found, weights=[len(clips.texts_of_visual[i]) for i in motion]) == pytest.approx(
            np.mean(best)
        )


def test_the_table_says_how_little_few_clips_show():
    right = {"1_frame": np.zeros(10), "4_frames": np.r_[np.ones(5), np.zeros(5)], "shuffled": np.r_[np.zeros(9), 1]}
    shares = [Shares("as given: all", 10.0, right)]
    assert table(shares).splitlines()[-1] == (
        "| as given: all | 10 | 0.0 (0 to 28) | 50.0 (24 to 76) | 10.0 (2 to 40) | 10.0 "
        "| 5 better, 0 worse, p 0.06 | 5 better, 1 worse, p 0.22 |"
    )
    text = explanation(shares, reranks=False)
    assert "fewer than 6 clips, all in one direction (60 points of 10 clips), cannot reach p < 0.05." in text
    assert "by the dual encoder as the checkpoint prefers" in text
    few = Shares("as given: motion", 25.0, {shown: each[:4] for shown, each in right.items()})
    assert "nor can any of fewer clips" in explanation([*shares, few], reranks=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_study_runs_on_clips_of_ones_own(tmp_path, shapes, tokenizer):
    mine = tmp_path / "mine"
    mine.mkdir()
    for name, part in (("a_train", "clips_train"), ("b", "clips_test_motion")):
        rows = json.loads((shapes.folder / f"{part}.json").read_text())[:16]
        for row in rows:
            media = row.get("video") or row["image"]
            target = mine / f"{name}_{os.path.basename(media)}"
            shutil.copyfile(shapes.folder / "media" / media, target)
            row |= {"video": target.name, "caption": row["caption"]}
            row.pop("image", None)
        asked = [{"video": row["video"], "question": "what color is it", "answer": "red"} for row in rows]
        (mine / f"{name}.json").write_text(json.dumps(rows))
        (mine / f"{name}_questions.json").write_text(json.dumps(asked))
    model = small_model(tokenizer, loss_weight=LossWeights())
    save_model(model, model.config, tmp_path / "weights")
    tokenizer.save(tmp_path / "weights")
    study = tmp_path / "study"
    command = ["bash", str(ROOT / "launch/study_clips.sh"), str(tmp_path / "weights"), str(study), str(mine)]
    small = {"FINETUNE_EPOCHS": "1", "SIZE": "48", "MOTION": "*[02468].* *#1"}
    done = subprocess.run(command, env=os.environ | small, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    text = (study / "study.md").read_text()
    assert text in done.stdout
    for row in (
        "as given: motion | 16",
        "tuned on 4 frames, temporal encoder: all | 16",
        "questions, tuned on 1 frame",
    ):
        assert row in text
    assert (study / "study.png").stat().st_size > 1000
    again = subprocess.run(command, env=os.environ | small, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0
    assert "$ " not in again.stdout  # every step is done
