"""The study: what it measures, that one frame cannot tell a motion from its reverse, and its commands."""

import os
import subprocess

import numpy as np
import pytest
from small_run import ROOT

from launch.study import CAPTION, Share, direction_share, table
from preprocessing.frames import choose_frames
from sharding.shapes.draw import FPS, FRAMES
from sharding.shapes.scenes import MOTIONS, Clip, clip_of
from sharding.shapes.texts import motion_words

LABELS = [CAPTION.format(motion_words(motion)) for motion in MOTIONS]


def shown(clip):
    """What the test frames of a clip show, 4 of all."""
    scenes = [clip.at(number / (FRAMES - 1)) for number in choose_frames("middle", 4, FRAMES, FPS)]
    return [[(thing.size, round(thing.x, 6), round(thing.y, 6)) for thing in scene.things] for scene in scenes]


@pytest.mark.parametrize("motion", MOTIONS, ids=lambda motion: f"{motion.kind}-{motion.direction}")
def test_without_their_order_the_test_frames_of_a_motion_are_those_of_its_reverse(motion):
    scene = clip_of(0, 0, 7, groups=False).scene
    forward, backward = shown(Clip(scene, motion, 0.3)), shown(Clip(scene, motion.reverse, 0.3))
    assert forward == backward[::-1]
    assert forward != backward


def test_a_model_that_sees_frames_without_their_order_is_right_in_half_of_the_clips():
    generator = np.random.default_rng(0)
    scores = np.repeat(generator.normal(size=(len(MOTIONS) // 2, len(LABELS))), 2, axis=0)  # one row for both of a pair
    assert direction_share(scores, LABELS, LABELS, "").value == 50


def test_the_share_counts_the_clips_whose_true_motion_scores_higher_than_its_reverse():
    scores = np.zeros((4, len(LABELS)))
    scores[0, 0], scores[1, 1], scores[2, 3] = 1, 1, 1  # right, right, wrong, a tie
    share = direction_share(scores, LABELS, LABELS[:4], "")
    assert (share.value, share.chance, share.count) == (62.5, 50, 4)
    assert share.noise == pytest.approx(200 * (0.625 * 0.375 / 4) ** 0.5)


def test_the_table_gives_the_difference_of_the_runs_with_the_noise_of_both():
    found = {"single": [Share("motion", 50, 50, 400)], "temporal": [Share("motion", 80, 50, 400)]}
    assert table(found).splitlines()[-1] == "| motion | 50.0 ± 5.0 | 80.0 ± 4.0 | +30.0 ± 6.4 | 50.0 |"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_study_writes_its_table_and_its_pictures_beside_another_job_on_the_usual_port(tmp_path, usual_port):
    small = {"IMAGES": "128", "CLIPS": "128", "TEST_ITEMS": "32", "PRETRAIN_EPOCHS": "1", "FINETUNE_EPOCHS": "1"}
    command = ["bash", str(ROOT / "launch" / "study.sh"), str(tmp_path / "study")]
    done = subprocess.run(command, env=os.environ | small, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    table = (tmp_path / "study" / "study.md").read_text()
    assert table.count("\n") == 8
    assert table in done.stdout
    assert all((tmp_path / "study" / name).stat().st_size > 1000 for name in ("study.png", "curves.png"))
