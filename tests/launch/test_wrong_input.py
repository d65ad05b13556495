"""Wrong input: one clear line that says what is wrong and what to do, at once, and exit code 2."""

import json
import shutil

import pytest
from small_run import ROOT, run


def error_of(result):
    """The one line that the user reads; fails when there are more."""
    errors = [line for line in result.stderr.strip().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    return errors[0]


@pytest.fixture
def refused(corpora, tmp_path):
    """Runs a single process that must refuse its input, without a trace of it; returns its only line."""

    def start(script, *settings, config=corpora / "tiny.yaml"):
        result = run(script, *([config] if config else []), *settings, processes=1)
        assert result.returncode == 2, result.stdout + result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
        assert all(line.startswith("[") for line in result.stdout.splitlines()), result.stdout  # what it was doing
        assert not (tmp_path / "run").exists()
        return error_of(result)

    return start


def test_settings_are_checked_before_anything_else(refused):
    assert "nowhere.yaml does not exist" in refused("pretrain", config="nowhere.yaml")
    assert "unknown key 'optimzer'" in refused("pretrain", "optimzer.lr=1")
    assert "optimizer.lr is 'fast' (str), must be a number" in refused("finetune_retrieval", "optimizer.lr=fast")
    assert "write key=value" in refused("evaluate", "checkpoint")
    assert "--help" in refused("pretrain", config=None)


@pytest.mark.parametrize("script", ["pretrain", "finetune_retrieval", "finetune_qa", "evaluate"])
def test_help_says_how_to_start(script):
    result = run(script, "--help", processes=1)
    assert result.returncode == 0
    assert f"deepspeed launch/{script}.py CONFIG.yaml" in result.stdout


def test_a_precision_that_the_processor_does_not_have(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # as if it were an older one
    line = refused("pretrain", f"output_dir={tmp_path}/run", "precision=fp16")
    assert "precision=fp16: this CPU has no fp16 instructions" in line
    assert "set precision=bf16, or fp32" in line


def test_shards_of_another_version(refused, corpora, tmp_path):
    newer = tmp_path / "newer"
    shutil.copytree(corpora / "images_train", newer)
    description = json.loads((newer / "corpus.json").read_text())
    (newer / "corpus.json").write_text(json.dumps({**description, "version": 99}))
    line = refused("pretrain", f"output_dir={tmp_path}/run", f"train_corpus={newer}")
    assert "version 99" in line
    assert "python -m sharding.build" in line


def test_a_hub_name_without_network(refused, tmp_path):
    line = refused("pretrain", f"output_dir={tmp_path}/run", "tokenizer=bert-base-uncased")
    assert "tokenizer=bert-base-uncased" in line
    assert "set tokenizer=" in line


def test_a_split_that_decides_must_be_evaluated(refused, corpora, tmp_path):
    where = (f"output_dir={tmp_path}/run", f"test_corpus={{first: {corpora}/a, second: {corpora}/b}}")
    line = refused("finetune_retrieval", *where, "stop_key=first", "splits=[second]")
    assert "stop_key=first is not among splits=['second']: add it, or splits=[] for all" in line


@pytest.mark.parametrize(
    ("setting", "reported"),
    [
        ("batch_size.video=3", "batch_size.video=3 cannot be shared equally by 2 processes: use 2 or 4"),
        ("train_corpus=coco", "train_corpus names 'coco'"),
    ],
)
def test_two_processes_report_it_once(corpora, tmp_path, setting, reported):
    result = run("pretrain", corpora / "tiny.yaml", f"output_dir={tmp_path}/run", setting)
    assert result.returncode != 0
    assert reported in error_of(result)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else(refused):
    line = refused("pretrain", f"output_dir={ROOT / 'train'}")
    assert "is not empty and is not a run folder: choose another output_dir" in line
