"""A disk that is full, or cannot be written to, ends a run with one line; what was saved before is whole."""

import errno
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError
from small_run import command, environment, learned, metrics, run

from model.checkpoints.loading import load_weights
from model.config import ModelConfig
from runtime.errors import UserError, user_message
from runtime.ranks import Ranks
from train.checkpoints import writing
from train.checkpoints.writing import STATE, CheckpointWriter, TrainingState
from train.config.settings import RunConfig
from train.folder import RunFolder
from train.tracking.profiling import StepProfiler
from train.tracking.trackers import Tracker

FULL = OSError(errno.ENOSPC, "No space left on device")
RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
QUOTA = OSError(errno.EDQUOT, "Disk quota exceeded")
READ_ONLY = OSError(errno.EROFS, "Read-only file system")


@pytest.fixture
def saving(tiny, tmp_path, monkeypatch):
    """A writer of checkpoints in tmp_path; `fail` makes one of its steps fail."""
    writer = CheckpointWriter(tmp_path, SimpleNamespace(weight=1), ModelConfig(), None, Ranks())

    def fail(where, error):
        whole = getattr(writing, where)

        def failing(*arguments, **settings):
            whole(*arguments, **settings)
            raise error

        monkeypatch.setattr(writing, where, failing)

    def save(step):
        return writer.save(TrainingState(step=step), keep=2)

    return SimpleNamespace(save=save, fail=fail, writer=writer)


SPACE, RIGHTS = "(No space left on device): free some space and", "(Read-only file system): make it writable and"


@pytest.mark.parametrize(
    ("where", "error", "reported"),
    [
        ("write_shard", RUST, SPACE),
        ("write_shard", FULL, SPACE),
        ("_write_whole_weights", RUST, SPACE),
        ("_write_state", QUOTA, "(Disk quota exceeded): free some space and"),
        ("_write_state", READ_ONLY, RIGHTS),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_one_line_and_leaves_the_earlier_one(
    saving, tmp_path, where, error, reported
):
    saving.save(3)
    saving.fail(where, error)
    with pytest.raises(UserError) as caught:
        saving.save(5)
    assert str(caught.value) == (
        f"{tmp_path}/step_00000005 cannot be written {reported} run the same command again, which continues from "
        "step_00000003, which is complete"
    )
    assert os.listdir(tmp_path) == ["step_00000003"]


def test_the_first_checkpoint_and_the_best_model_and_a_state_alike(saving, tmp_path):
    path = saving.save(1)
    saving.fail("_write_state", FULL)
    with pytest.raises(UserError, match=r"step_00000001 cannot be written"):
        saving.writer.update(TrainingState(step=1))
    saving.fail("write_shard", RUST)
    with pytest.raises(UserError, match=r"best_00000001 cannot be written \(No space"):
        saving.writer.save_best(TrainingState(step=1), "val")
    assert os.listdir(tmp_path) == ["step_00000001"]
    assert (path / STATE).is_file()
    shutil.rmtree(path)
    with pytest.raises(UserError, match="same command again, which starts from the beginning"):
        saving.save(5)


def test_an_error_that_is_no_fault_of_the_disk_stays_what_it_is(saving):
    assert user_message(RUST).startswith("No space left on device: free some")
    saving.fail("write_shard", SafetensorError("Error while serializing: InvalidTensor"))
    with pytest.raises(SafetensorError):
        saving.save(5)


def test_metrics_that_cannot_be_written_name_their_file(tmp_path):
    folder = RunFolder(tmp_path)
    tracker = Tracker(folder, RunConfig(), total_steps=10, step=0)

    def refuse():
        raise OSError(errno.ENOSPC, "No space left on device")

    tracker._file = SimpleNamespace(write=lambda text: None, flush=refuse)
    with pytest.raises(OSError) as caught:
        tracker.evaluation(1, 1, {"val/": {"r_mean": 1.0}})
    assert user_message(caught.value).startswith(f"No space left on device: '{folder.metrics}': free some")


def test_a_trace_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file")
    profiler = StepProfiler([1, 1], tmp_path / "profile", 0, SimpleNamespace(type="cpu"))
    profiler.before(1)
    profiler.after(1)
    profiler.close()
    assert "Lost the trace of steps 1 to 1" in caplog.text


def small_disk(folder, megabytes, words):
    """A command whose folder is a file system of so many megabytes of its own."""
    mount = f'mount -t tmpfs -o size={megabytes}m none "{folder}" && shift && "$@"; code=$?; ls -A "{folder}"/run/*; '
    keep = f'cp -r "{folder}/run" "{folder}.kept"; exit $code'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount + keep, "sh", "--", *words]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_real_disk_that_gets_full_ends_all_processes_and_a_larger_one_continues(corpora, tmp_path, processes):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(small_disk(disk, 1, ["true"]), capture_output=True).returncode:
        pytest.skip("the kernel does not let this user mount a file system")
    settings = ("scheduler.epochs=2", "save_every=2", "keep_checkpoints=99")
    words = command("pretrain", corpora / "tiny.yaml", f"output_dir={disk}/run", *settings, processes=processes)
    ended = subprocess.run(small_disk(disk, 6, words), env=environment(), capture_output=True, text=True, timeout=600)
    reported = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert len(reported) == 1
    assert "cannot be written" in reported[0]
    assert "(No space left on device): free some space and run the same command again" in reported[0]
    assert "Traceback" not in ended.stderr
    kept = tmp_path / "disk.kept"
    assert not [path for path in (kept / "checkpoints").iterdir() if path.name.startswith(".")]
    assert load_weights(kept).state
    steps = metrics(kept)[-1]["step"]
    again = run("pretrain", corpora / "tiny.yaml", f"output_dir={kept}", *settings, processes=processes)
    assert again.returncode == 0, again.stdout + again.stderr
    assert steps < 16
    assert [line["step"] for line in learned(kept)] == list(range(1, 17))
