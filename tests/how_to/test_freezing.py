"""docs/how-to/freezing.md, word for word: its YAML in a folder of one's own, fine-tuned on two processes."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from blocks import blocks
from small_run import job, run_jobs

from model.checkpoints.loading import load_weights
from model.freezing import names_below
from runtime.errors import UserError
from train.config.settings import load_settings
from train.folder import RunFolder

SMALL = (
    "vision_encoder.width=32", "vision_encoder.depth=1", "text_encoder.width=32", "text_encoder.layers=2",
    "text_encoder.intermediate=64", "image_res=32", "embed_dim=16",
)  # fmt: skip
SHORT = (
    "batch_size={image: 8, video: 8}", "batch_size_test={image: 8, video: 8}", "k_test=4", "gallery=0", "log_every=1",
    "max_steps=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shapes) -> Path:
    """A user's folder with the page's files, a pre-training run and the page's run from it."""
    folder = tmp_path_factory.mktemp("own")
    for name, content in blocks("freezing").items():
        (folder / name).write_text(content)
    where = (f"data_root={shapes.shards}", f"tokenizer={shapes.vocab}")
    tuned = (f"pretrained_path={folder}/pretrain", f"output_dir={folder}/frozen", "splits=[motion]")
    run_jobs(
        folder,
        [
            job("pretrain", "configs/demo/pretrain.yaml", *where, f"output_dir={folder}/pretrain", *SMALL, *SHORT),
            job("finetune_retrieval", folder / "my_run.yaml", *where, *tuned, *SHORT, "precision=bf16"),
        ],
    )
    return folder


def test_what_is_frozen_stays_to_the_bit_and_the_rest_is_trained(folder: Path) -> None:
    before, after = load_weights(folder / "pretrain").state, load_weights(folder / "frozen").state
    prefixes = load_settings(folder / "my_run.yaml").config.freeze
    frozen = names_below(after.keys(), prefixes, "freeze")
    common = after.keys() & before.keys()
    assert frozen <= common
    same = {name for name in common if torch.equal(before[name], after[name])}
    assert frozen <= same
    assert len(same - frozen) < len(common - frozen) / 4
    trained = sum(tensor.numel() for name, tensor in after.items() if name not in frozen) / 1e6
    log = (folder / "frozen/log.txt").read_text()
    assert re.search(r"M parameters, (\d\.\d) M of them trained", log)[1] == f"{trained:.1f}"


def test_a_resumed_run_must_freeze_the_same(folder: Path) -> None:
    (folder / "frozen/finished.json").unlink(missing_ok=True)
    claimed, record = RunFolder(folder / "frozen"), folder / "frozen/config.yaml"
    claimed.claim(load_settings(record).config)
    claimed.release()
    with pytest.raises(UserError, match=r"freeze is .* in that run, \['vision_encoder'\] here"):
        claimed.claim(load_settings(record, ["freeze=[vision_encoder]"]).config)


def test_the_names_of_a_checkpoint_are_listed(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["names.py", str(folder / "pretrain")])
    runpy.run_path(str(folder / "names.py"))
    assert "vision_encoder.transformer.blocks.0.attn.qkv.weight (96, 32)\n" in capsys.readouterr().out
