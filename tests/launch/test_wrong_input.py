"""Wrong input: one clear line that says what is wrong and what to do, at once, and exit code 2."""

import json
import shutil

import pytest
from small_run import ROOT, run


def error_of(result):
    """The one line that the user reads; fails when there are more."""
    lines = result.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    return errors[0]


def refused(script, *arguments):
    """Run a single process that must refuse its input; returns its only line."""
    result = run(script, *arguments, processes=1)
    assert result.returncode == 2, result.stdout + result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert all(line.startswith("[") for line in result.stdout.splitlines()), result.stdout  # what it was doing
    return error_of(result)


def test_settings_are_checked_before_anything_else(corpora, tmp_path):
    tiny = corpora / "tiny.yaml"
    assert "nowhere.yaml does not exist" in refused("pretrain", "nowhere.yaml")
    assert "unknown key 'optimzer'" in refused("pretrain", tiny, "optimzer.lr=1")
    assert "optimizer.lr is 'fast' (str), must be a number" in refused("finetune_retrieval", tiny, "optimizer.lr=fast")
    assert "write key=value" in refused("evaluate", tiny, "checkpoint")
    assert "--help" in refused("pretrain")


@pytest.mark.parametrize("script", ["pretrain", "finetune_retrieval", "finetune_qa", "evaluate"])
def test_help_says_how_to_start(script):
    result = run(script, "--help", processes=1)
    assert result.returncode == 0
    assert f"deepspeed launch/{script}.py CONFIG.yaml" in result.stdout


def test_a_precision_that_the_processor_does_not_have(corpora, tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # as if it were an older one
    line = refused("pretrain", corpora / "tiny.yaml", f"output_dir={tmp_path}/run", "precision=fp16")
    assert "precision=fp16: this CPU has no fp16 instructions" in line
    assert "set precision=bf16, or fp32" in line
    assert not (tmp_path / "run").exists()


def test_shards_of_another_version(corpora, tmp_path):
    newer = tmp_path / "newer"
    shutil.copytree(corpora / "images_train", newer)
    description = json.loads((newer / "corpus.json").read_text())
    (newer / "corpus.json").write_text(json.dumps({**description, "version": 99}))
    line = refused("pretrain", corpora / "tiny.yaml", f"output_dir={tmp_path}/run", f"train_corpus={newer}")
    assert "version 99" in line
    assert "python -m sharding.build" in line
    assert not (tmp_path / "run").exists()


def test_a_hub_name_without_network(corpora, tmp_path):
    line = refused("pretrain", corpora / "tiny.yaml", f"output_dir={tmp_path}/run", "tokenizer=bert-base-uncased")
    assert "tokenizer=bert-base-uncased" in line
    assert "set tokenizer=" in line


def test_a_split_that_decides_must_be_evaluated(corpora, tmp_path):
    where = (f"output_dir={tmp_path}/run", f"test_corpus={{first: {corpora}/a, second: {corpora}/b}}")
    line = refused("finetune_retrieval", corpora / "tiny.yaml", *where, "stop_key=first", "splits=[second]")
    assert "stop_key=first is not among splits=['second']: add it, or splits=[] for all" in line
    assert not (tmp_path / "run").exists()


def test_two_processes_tell_it_once(corpora, tmp_path):
    arguments = (corpora / "tiny.yaml", f"output_dir={tmp_path}/run")
    result = run("pretrain", *arguments, "batch_size.video=3")
    assert result.returncode != 0
    assert "batch_size.video=3 cannot be shared equally by 2 processes: use 2 or 4" in error_of(result)
    result = run("pretrain", *arguments, "train_corpus=coco")
    assert result.returncode != 0
    assert "train_corpus names 'coco'" in error_of(result)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_something_else(corpora):
    line = refused("pretrain", corpora / "tiny.yaml", f"output_dir={ROOT / 'train'}")
    assert "is not empty and is not a run folder: choose another output_dir" in line
