"""`launch.reproduce`: from files as their authors distribute them to numbers beside the paper's."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from packed import rows_of
from PIL import Image
from places import ROOT
from small_run import environment

from eval.report.published import all_published
from launch.reproduce import running
from launch.reproduce.__main__ import main
from launch.reproduce.comparing import report
from launch.reproduce.page import PAGE, with_tables
from launch.reproduce.rows import PRE_TRAINED, find_row, inputs, rows
from launch.reproduce.steps import Reproduction
from loaders.vocab import learn_from_texts
from model.building import build_model
from model.checkpoints.files import Weights
from model.config import ModelConfig, TextConfig, VisionConfig
from model.export import write_official
from sharding.settings import read_settings

QUICK = ["tokenizer=vocab.txt", "k_test=2", "batch_size_test={image: 64, video: 8}"]
NOUNS = ("dog", "cat", "man", "boat", "tree", "road", "ball", "bird")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder of a user, with a vocabulary."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SL_DATA_DIR", raising=False)
    learn_from_texts([*NOUNS, "a photo of the 0 1 2 3 4 5 6 7 8 9"], 100, "vocab.txt")
    return tmp_path


def write_checkpoint(path):
    """A small model of the published kind, in the form of the official files: without our configuration."""
    words = len((path.parents[2] / "vocab.txt").read_text().splitlines())
    sizes = {"vocab_size": words, "width": 64, "layers": 2, "fusion_layer": 1, "heads": 1, "intermediate": 64}
    vision = VisionConfig(type="beit", width=64, depth=1, heads=1)
    config = ModelConfig(vision, TextConfig(**sizes), image_res=32, embed_dim=16)
    torch.manual_seed(0)
    path.parent.mkdir(parents=True)
    write_official(Weights(config, build_model(config).state_dict()), path)
    content = torch.load(path, weights_only=False)
    del content["config"]["model_config"]
    torch.save(content, path)


def write_flickr30k(downloads, count):
    """Pictures and Karpathy's split of them: `count` in the test set, two to train and two to validate."""
    (downloads / "flickr30k-images").mkdir(parents=True)
    (downloads / "caption_datasets").mkdir()
    images = []
    for number in range(count + 4):
        pixels = np.random.default_rng(number).integers(0, 255, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((40, 32)).save(downloads / f"flickr30k-images/{number}.jpg")
        text = f"a {NOUNS[number % 8]} of {number}"
        sentence = {"tokens": text.split(), "raw": f"{text.capitalize()} .", "imgid": number, "sentid": number}
        split = "test" if number < count else ("train", "val")[number % 2]
        about = {"sentids": [number], "imgid": number, "split": split, "filename": f"{number}.jpg"}
        images.append({**about, "sentences": [sentence]})
    described = {"images": images, "dataset": "flickr30k"}
    (downloads / "caption_datasets/dataset_flickr30k.json").write_text(json.dumps(described))


def write_msrvtt(downloads, count):
    """Clips of a second, and the test set 1k-A of them."""
    videos = downloads / "MSRVTT/videos/all"
    videos.mkdir(parents=True)
    lines = ["key,vid_key,video_id,sentence"]
    for number in range(count):
        with av.open(str(videos / f"video{number}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=8)
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            for each in range(8):
                frame = np.full((32, 48, 3), number * 20 + each * 8, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
            container.mux(stream.encode())
        lines.append(f"ret{number},msr{number},video{number},a {NOUNS[number % 8]}")
    (downloads / "MSRVTT/MSRVTT_JSFUSION_test.csv").write_text("\n".join(lines) + "\n")


def reproduce(*words):
    """Run the command as a user does; returns its exit code and output."""
    command = [sys.executable, str(ROOT / "launch/console.py"), "reproduce", *words]
    done = subprocess.run(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=550
    )
    return done.returncode, done.stdout


def test_a_row_from_the_distributed_files_to_its_comparison(folder):
    name, file = "flickr30k_17m", folder / "downloads/flickr_ret/ft_flickr_ret_singularity_17m.pth"
    code, shown = reproduce(name, *QUICK)
    assert code == 2
    assert f"# missing: downloads/flickr_ret/{file.name}\n#    from: https://vision.cs.unc.edu" in shown
    assert "# missing: downloads/caption_datasets/dataset_flickr30k.json" in shown
    assert "flickr30k_17m lacks 3 files or folders" in shown.splitlines()[-1]

    write_checkpoint(file)
    write_flickr30k(folder / "downloads", 1000)
    code, shown = reproduce(name, *QUICK)
    assert code == 1, shown  # a random model is not as good as the paper's
    assert len(rows_of("data/flickr30k_test")) == 1000
    found = json.loads((folder / "runs/reproduce" / name / "metrics.json").read_text())["test/"]
    published = find_row(name).published["test"]
    for metric, value in published.items():
        assert f"{metric:<10}{value:>10.2f}{found[metric]:>9.2f}{found[metric] - value:>+12.2f}" in shown
    assert "outside of the tolerance 1" in shown.splitlines()[-1]

    (folder / "downloads/caption_datasets/dataset_flickr30k.json").unlink()  # packed
    code, shown = reproduce(name, *QUICK, "--tolerance", "100")
    assert code == 0, shown
    assert shown.count("# done: singularity") == 2
    assert "within the tolerance 100" in shown.splitlines()[-1]


@pytest.mark.slow
def test_a_zero_shot_row_of_clips_in_two_processes_with_fewer_clips_than_the_paper(folder):
    write_checkpoint(folder / "downloads/pt/singularity_17m.pth")
    write_msrvtt(folder / "downloads", 6)
    code, shown = reproduce("msrvtt_17m_zero_shot", *QUICK, "--tolerance", "100", "--num-accelerators", "2")
    assert code == 1, shown
    assert "data/msrvtt_1k_test has 6 of 1,000 images or videos, the numbers do not compare" in shown
    details = json.loads(
        (folder / "runs/reproduce/msrvtt_17m_zero_shot/evaluation/12_frames/evaluation.json").read_text()
    )
    assert details["splits"]["msrvtt_1k_test"]["num_frames"] == 12


@pytest.mark.slow
def test_a_row_by_fine_tuning(folder):
    write_checkpoint(folder / "downloads/pt/singularity_17m.pth")
    write_flickr30k(folder / "downloads", 1000)
    quick = [*QUICK, "batch_size.image=2", "max_steps=2", "deepspeed=deepspeed_configs/cpu.json", "precision=fp32"]
    words = ["flickr30k_17m", *quick, "--train", "--tolerance", "100"]
    code, shown = reproduce(*words)
    assert code == 0, shown
    assert (folder / "runs/reproduce/flickr30k_17m_trained/finished.json").is_file()
    code, shown = reproduce(*words)
    assert code == 0, shown
    assert shown.count("# done: singularity") == 5  # three corpora, the fine-tuning, the evaluation
    code, shown = reproduce(*words, "optimizer.lr=1e-3")
    assert code == 2
    assert "holds a run that is finished" in shown


def task_of(name, **options):
    return Reproduction(find_row(name), Path("downloads"), Path("runs"), **options)


def test_every_published_number_is_in_a_row_and_its_commands_name_what_there_is(folder):
    numbers = [value for row in rows().values() for split in row.published.values() for value in split.values()]
    recalls = [name for each in all_published() for name in each.metrics if not name.endswith("r_mean")]
    assert len(numbers) == len(recalls)
    kinds = {(row.benchmark, row.temporal, row.zero_shot): row for row in rows().values()}
    packed = {}
    for row in kinds.values():
        for train in (False, True)[: 1 if row.zero_shot else 2]:
            task = task_of(row.name, train=train)
            assert all(source.strip() for source in task.missing().values())  # also raises where one has no source
            packed |= {step.corpus: step.words for step in task.commands() if step.corpus}
            benchmark = task.evaluation.benchmark
            assert benchmark == row.benchmark
            assert task.evaluation.video_input.num_frames_test == row.num_frames
            assert set(task.evaluation.test_urls()) == set(row.published)
            assert not train or task.training.video_input.num_frames == (4 if row.temporal else 1)
    assert {Path(url).name for url in packed} == set(inputs().corpora)
    for url, (name, *flags) in packed.items():
        settings = read_settings({"annotations": flags[3:4], "output": url}, corpus=flags[1])
        assert (name, flags[0], flags[-1]) == ("pack", "--corpus", url)
        assert settings.shards.media_type in ("image", "video")


def test_the_page_has_the_tables_of_the_data():
    assert PAGE.read_text() == with_tables(PAGE.read_text()), "python -m launch.reproduce.page"


def test_nothing_is_fetched_that_no_row_needs():
    named = {name for corpus in inputs().corpora.values() for each in corpus.annotations for name in each.files}
    named |= {name for corpus in inputs().corpora.values() for name in corpus.media}
    named |= {each.checkpoints for each in inputs().benchmarks.values()} | {PRE_TRAINED}
    assert set(inputs().sources) == {source for source in inputs().sources if any(
        f"{name}/".startswith(f"{source}/") for name in named)}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["msrvtt_17"], "there is no row 'msrvtt_17': nearest are msrvtt_17m"),
        (["msrvtt_17m_zero_shot", "--train"], "msrvtt_17m_zero_shot is zero-shot: leave out --train"),
        (["msrvtt_17m", "k_tets=3"], "k_tets"),
        (
            ["msrvtt_17m", "test_corpus.msrvtt_1k_test=./mine"],
            "./mine is not a corpus of configs/reproduce/benchmarks.yaml",
        ),
        (["msrvtt_17m", "--checkpoint", "mine.pth"], "msrvtt_17m lacks 3 files"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, words, said):
    assert main(words) == 2
    assert said in capsys.readouterr().err


def test_of_several_checkpoints_one_has_to_be_chosen(folder, capsys):
    for name in ("singularity_17m.pth", "old_singularity_17m.pth", "singularity_temporal_17m.pth"):
        path = folder / "downloads/pt" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert task_of("msrvtt_temporal_17m", train=True).weights() == "downloads/pt/singularity_temporal_17m.pth"
    assert main(["msrvtt_17m_zero_shot"]) == 2
    assert "has several files *singularity_17m.pth: choose one with --checkpoint FILE" in capsys.readouterr().err


@pytest.fixture
def whole_test_sets(monkeypatch):
    """As if every test corpus were as large as published."""
    monkeypatch.setattr("launch.reproduce.comparing.num_samples", lambda url: inputs().corpora[Path(url).name].samples)


def test_what_the_server_has_to_score_is_named(folder, whole_test_sets):
    task = task_of("vqa_17m")
    task.run_folder.mkdir(parents=True)
    task.metrics_file.write_text("{}")
    text, code = report(task, 1.0)
    assert code == 0
    assert "test_std: the answers are not public, upload runs/vqa_17m/evaluation/*/submission/test_std.json" in text
    assert "73.27" in text


def test_numbers_of_the_dual_encoder_alone_are_no_reproduction(folder, whole_test_sets):
    task = task_of("flickr30k_17m", settings=["k_test=0"])
    task.run_folder.mkdir(parents=True)
    task.metrics_file.write_text(
        json.dumps({"test_emb/": dict.fromkeys(find_row("flickr30k_17m").published["test"], 90)})
    )
    text, code = report(task, 100.0)
    assert code == 1
    assert "test: not re-ranked, as the published numbers are" in text
    assert "not public" not in text


def test_other_settings_of_a_finished_fine_tuning_are_refused_each_time(folder, monkeypatch):
    """The refused command must not count as the one that has finished."""
    first, other = (task_of("flickr30k_17m", train=True, settings=[f"seed={seed}"]) for seed in (1, 2))
    asked = []

    def finetune(command):
        asked.append(command)
        if "finetune" in command and not (first.run_folder / "finished.json").is_file():
            first.run_folder.mkdir(parents=True)
            (first.run_folder / "finished.json").touch()
            return SimpleNamespace(returncode=0)
        return SimpleNamespace(returncode=2)

    monkeypatch.setattr(running.subprocess, "run", finetune)
    monkeypatch.setattr(Reproduction, "corpora", lambda task: {})
    assert running.run(first) == 2  # by its evaluation
    assert running.run(other) == 2
    assert running.run(other) == 2
    assert ["finetune" if "finetune" in command else "evaluate" for command in asked] == [
        "finetune", "evaluate", "finetune", "finetune",
    ]  # fmt: skip


def test_the_largest_difference_decides(folder, whole_test_sets):
    task = task_of("msrvtt_mc_17m")
    task.run_folder.mkdir(parents=True)
    for accuracy, code in ((91.2, 0), (93.0, 0), (90.9, 1), (93.2, 1)):
        task.metrics_file.write_text(json.dumps({"test": {"overall": accuracy}}))
        assert report(task, 1.0)[1] == code
