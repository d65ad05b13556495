"""Copies of checkpoints in an object store: a run resumes from them, and no error of the store ends a run."""

import shutil

import pytest
import torch
from faulty_proxy import Faults
from object_stores import activate, environment_of, free_port
from safetensors.torch import load_file
from small_run import job, learned, run_jobs

from model.checkpoints.loading import load_weights
from model.export import main as export
from runtime.errors import AccessError, UserError
from train.checkpoints.copies import RemoteCheckpoints
from train.checkpoints.writing import STATE


@pytest.fixture
def checkpoint(tmp_path):
    """A small checkpoint folder, and the settings of its run."""
    folder = tmp_path / "run/checkpoints/step_00000005"
    for name in ("parts/0.safetensors", "weights/model.safetensors", STATE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (tmp_path / "run/config.yaml").write_text("seed: 1\n")
    return folder


def upload(copies, checkpoint):
    copies.upload(checkpoint, checkpoint.parents[1] / "config.yaml", keep=2)


@pytest.mark.parametrize("store", ["s3", "gcs"], indirect=True)
def test_a_store_that_refuses_is_logged_and_the_next_upload_retries(
    store, faulty, monkeypatch, checkpoint, tmp_path, caplog
):
    proxy = faulty(store, Faults(permanent="upload|safetensors", permanent_status=403))
    copies = RemoteCheckpoints(store.url("copies"), {})
    upload(copies, checkpoint)
    assert f"{checkpoint} was not copied to {store.url('copies')}" in caplog.text
    assert "retrying with the next checkpoint" in caplog.text
    assert copies.steps() == []
    assert proxy.counts()["permanent"] > 0
    activate(environment_of(store.kind, store.address), monkeypatch)
    copies = RemoteCheckpoints(f"{store.url('copies')}/", {})  # the same folder
    upload(copies, checkpoint)
    assert copies.steps() == ["step_00000005"]
    copies.fetch(tmp_path / "elsewhere")
    fetched = tmp_path / "elsewhere/checkpoints/step_00000005"
    assert (fetched / "weights/model.safetensors").read_text() == "weights/model.safetensors"


def test_a_store_that_has_gone_does_not_end_a_run_but_is_reported_at_its_start(
    s3, monkeypatch, checkpoint, tmp_path, caplog
):
    activate({**environment_of("s3", f"127.0.0.1:{free_port()}"), "AWS_MAX_ATTEMPTS": "1"}, monkeypatch)
    copies = RemoteCheckpoints(s3.url("copies"), {})
    upload(copies, checkpoint)
    assert f"{checkpoint} was not copied to {s3.url('copies')} (EndpointConnectionError: Could not" in caplog.text
    with pytest.raises(AccessError, match=rf"checkpoint_url={s3.url('copies')}: its copies cannot be fetched"):
        copies.fetch(tmp_path / "elsewhere")


@pytest.mark.parametrize("place", ["disk", "s3"])
@pytest.mark.parametrize("name", ["run[1]", "what?", "a*b", "{x}"])
def test_a_url_may_hold_what_means_something_to_patterns(place, name, checkpoint, tmp_path, request):
    url = str(tmp_path / name) if place == "disk" else request.getfixturevalue("s3").url(name)
    for step in (5, 10, 15):
        newer = checkpoint.rename(checkpoint.with_name(f"step_{step:08d}"))
        copies = RemoteCheckpoints(url, {})
        assert copies.upload(newer, newer.parents[1] / "config.yaml", keep=2)
        checkpoint = newer
    assert RemoteCheckpoints(url, {}).steps() == ["step_00000010", "step_00000015"]
    assert not copies._files.find("step_00000005")
    copies.fetch(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere/checkpoints/step_00000015" / STATE).is_file()


def test_a_bucket_that_does_not_exist_is_reported_at_the_start(s3):
    with pytest.raises(UserError, match=r"bucket no-such-bucket does not exist: create it"):
        RemoteCheckpoints("s3://no-such-bucket/runs/a", {}).check()


def test_credentials_in_the_url_are_refused():
    with pytest.raises(ValueError, match="contains a user, a password or a signature"):
        RemoteCheckpoints("s3://me:secret@bucket/runs", {})


@pytest.mark.timeout(600)
def test_a_run_whose_disk_is_lost_resumes_from_s3_and_is_exported(corpora, s3, tmp_path):
    run, lost = tmp_path / "run", tmp_path / "lost"
    settings = (
        f"output_dir={run}", f"checkpoint_url={s3.url('copies')}", "deepspeed=deepspeed_configs/zero3.json",
        "max_steps=4",
        "save_every=2",
    )  # fmt: skip
    run_jobs(tmp_path, [job("pretrain", corpora / "tiny.yaml", *settings)], processes=1)
    run.rename(lost)
    copies = RemoteCheckpoints(s3.url("copies"), {})
    assert copies.steps() == ["step_00000002", "step_00000004"]
    for file in ("parts/rank_00000_of_00001.safetensors", STATE):  # as an upload that was cut off leaves it
        copies._files.rm_file(f"step_00000004/{file}")
    run_jobs(tmp_path, [job("pretrain", corpora / "tiny.yaml", *settings)], processes=1)
    assert [line["step"] for line in learned(run)] == [1, 2, 3, 4]  # the metrics were copied too
    assert learned(run) == learned(lost)
    weights = load_file(run / "checkpoints/step_00000004/weights/model.safetensors")
    assert export([str(run), str(tmp_path / "official.pth")]) == 0
    official = load_weights(tmp_path / "official.pth").state
    assert official.keys() == weights.keys()
    assert all(torch.equal(official[name], tensor) for name, tensor in weights.items())
    shutil.rmtree(run)
    with pytest.raises(AssertionError, match="in use by a run with other settings"):
        run_jobs(tmp_path, [job("pretrain", corpora / "tiny.yaml", *settings, "seed=5")], processes=1)
