"""The best model of a run, and its writing, survive a kill at any moment: at each single use of the file system."""

import json
import shutil
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from eval.metrics import reranking_helps
from model.checkpoints import loading as model_checkpoint
from model.checkpoints.files import Weights, resolve_weights, write_weights
from model.checkpoints.loading import load_weights
from model.config import ModelConfig
from runtime.ranks import Ranks
from storage.files import recover_folders
from train import loop
from train.checkpoints.best import best_steps, best_version
from train.checkpoints.copies import RemoteCheckpoints
from train.checkpoints.writing import STATE, CheckpointWriter, complete_checkpoints, read_state
from train.config.settings import RunConfig
from train.folder import RunFolder
from train.loop import Trainer, deciding_score

SCORES = (10.0, 30.0, 20.0, 40.0, 35.0)  # after each of the epochs, of two steps each
STEPS = 2 * len(SCORES)
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "shutil.copyfile")


class Killed(BaseException):
    """What SIGKILL does, as far as the file system can see."""


class Killer:
    """Counts what is done to the files below a folder, and stops everything from the nth time on."""

    def __init__(self):
        self.folder, self.count, self.last = None, 0, None
        sys.addaudithook(self.see)

    def see(self, event, arguments):
        if self.folder is None or event not in CHANGES or not str(arguments[0]).startswith(self.folder):
            return
        if event == "open" and (arguments[1] or "r").startswith("r"):
            return
        self.count += 1
        if self.last is not None and self.count > self.last:
            raise Killed

    @contextmanager
    def watching(self, folder, last=None):
        self.folder, self.count, self.last = str(folder), 0, last
        try:
            yield
        finally:
            self.folder = None


KILLER = Killer()


class TinyTrainer(Trainer):
    """The trainer's own saving, evaluating and resuming, of a model whose only weight is the step."""

    def __init__(self, folder, url=None, save_every=3):
        run = RunConfig(test_corpus={"val": "/val"}, stop_key="val", keep_checkpoints=2, save_every=save_every)
        self.run, self.ranks, self.folder = run, Ranks(), RunFolder(folder)
        self.engine = SimpleNamespace(zero_optimization_stage=lambda: 0, weight=0)
        self._remote = RemoteCheckpoints(url, {}) if url else None
        if self._remote is not None:
            self._remote.fetch(self.folder.path)
        self.folder.claim(run)
        self.folder.begin(run)
        quiet = SimpleNamespace(inspect=lambda: None, enter=lambda *_: None, pause=lambda _: None, restart=lambda: None)
        self.guard = self.watchdog = self._clock = quiet
        self.model, self.tracker = None, None
        self.writer = CheckpointWriter(self.folder.checkpoints, self.engine, ModelConfig(), None, self.ranks)
        self.state = self._resume()
        self._saved_step, self._saved_at = self.state.step, 0.0

    def train(self):
        def evaluate(model, splits, label):
            return {"val": {"r_mean": SCORES[self.engine.weight // 2 - 1]}}

        self._after_epoch(evaluate)
        while self.state.step < STEPS:
            self.state.step += 1
            self.engine.weight = self.state.step
            self.state.epoch, self.state.epoch_step = divmod(self.state.step, 2)
            if self.state.step % self.run.save_every == 0:
                self.save()
            self._after_epoch(evaluate)
        self.save()
        if self._remote is not None:
            self._remote.retry()
        self.folder.release()

    def _is_over(self):
        return self.state.step >= STEPS


@pytest.fixture(autouse=True)
def loaded(tiny, monkeypatch):
    def load_checkpoint(path, engine):
        engine.weight = int((path / "parts/rank_00000_of_00001.safetensors").read_text())
        return read_state(path)

    monkeypatch.setattr(loop, "load_checkpoint", load_checkpoint)


def weight(path):
    return int(load_weights(path).state["step"])


def check_end(trainer):
    folder = trainer.folder.checkpoints
    assert (trainer.state.best, trainer.state.best_step) == (40.0, 8)
    assert weight(trainer.folder.path) == weight(folder / "best") == 8
    newest = complete_checkpoints(folder)[-1]
    assert newest.name == f"step_{STEPS:08d}"
    assert (read_state(newest).best, read_state(newest).evaluated_epochs) == (40.0, len(SCORES))
    assert best_steps(folder) == [8]
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("save_every", "wiped", "every"),
    [
        (3, False, 13),
        (3, True, 13),
        *(
            pytest.param(save_every, wiped, 1, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])
            for save_every in (2, 3, 100)
            for wiped in (False, True)
        ),
    ],
)
def test_a_kill_at_any_use_of_the_disk_or_the_copies_loses_nothing(tmp_path, save_every, wiped, every):
    copies = tmp_path / "copies"
    with KILLER.watching(tmp_path):
        whole = TinyTrainer(tmp_path / "whole", f"file://{copies}", save_every)
        whole.train()
        number = KILLER.count
    check_end(whole)
    assert number > 100
    for last in range(0, number, every):
        shutil.rmtree(copies, ignore_errors=True)
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        seen = 0
        with KILLER.watching(tmp_path, last), pytest.raises(Killed):
            TinyTrainer(run, f"file://{copies}", save_every).train()
        found = [path for path in (run / "checkpoints").glob("*_*") if not path.name.startswith(".")]
        if found:  # a reader of the run finds its best model, or its newest
            seen = weight(run)
        best = [weight(path) for path in found if path.name.startswith("best_")]
        assert not best or seen == max(best), last
        if wiped:
            shutil.rmtree(run, ignore_errors=True)
        again = TinyTrainer(run, f"file://{copies}", save_every)
        again.train()
        check_end(again)
        shutil.rmtree(run)  # all of it is in the copies
        fetched = TinyTrainer(run, f"file://{copies}", save_every)
        assert (fetched.state.best, fetched.state.best_step, fetched.state.step) == (40.0, 8, STEPS), last
        assert weight(run) == 8
        fetched.folder.release()


def test_the_layout_of_earlier_versions_still_counts(tmp_path):
    trainer = TinyTrainer(tmp_path, save_every=2)
    trainer.train()
    folder = trainer.folder.checkpoints
    (folder / "best").unlink()
    best_version(folder, 8).rename(folder / "best")  # as it was: a folder, and a state without a step of it
    (folder / "best/best.json").unlink()
    for path in complete_checkpoints(folder):
        state = json.loads((path / STATE).read_text())
        del state["best_step"]
        (path / STATE).write_text(json.dumps(state))
    assert resolve_weights(tmp_path) == folder / "best/weights"
    assert weight(tmp_path) == 8
    again = TinyTrainer(tmp_path, save_every=2)
    assert (again.state.best, again.state.best_step) == (40.0, 0)
    assert weight(tmp_path) == weight(folder / "best") == 8


def test_a_score_whose_weights_are_gone_does_not_count(tmp_path, caplog):
    trainer = TinyTrainer(tmp_path, save_every=2)
    trainer.train()
    shutil.rmtree(best_version(trainer.folder.checkpoints, 8))
    again = TinyTrainer(tmp_path, save_every=2)
    assert (again.state.best, again.state.best_step) == (None, None)
    assert "Lost the best weights (score 40.00, " in caplog.text
    assert weight(tmp_path) == STEPS


def test_an_upload_that_fails_at_the_end_is_retried_and_logged(tmp_path, monkeypatch, caplog):
    trainer = TinyTrainer(tmp_path / "run", f"file://{tmp_path}/copies", save_every=2)

    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer._remote._files, "put_file", refuse)
    trainer.train()
    assert "retrying with the next checkpoint" in caplog.text
    assert f"The run has ended, and {trainer.folder.checkpoints}/step_00000010 is not in file://" in caplog.text
    check_end(trainer)


def test_a_reader_that_loses_a_race_with_the_run_reads_the_newer_one(tmp_path, monkeypatch):
    folder = TinyTrainer(tmp_path, save_every=2).folder.checkpoints
    for step in (2, 4):
        write_weights(Weights(ModelConfig(), {"step": torch.tensor(step)}), best_version(folder, step) / "weights")
    whole, seen = model_checkpoint.resolve_weights, []

    def resolve(path):
        seen.append(path)
        if len(seen) > 1:
            return whole(path)
        shutil.rmtree(best_version(folder, 2))  # between finding and reading
        return best_version(folder, 2) / "weights"

    monkeypatch.setattr(model_checkpoint, "resolve_weights", resolve)
    assert weight(tmp_path) == 4


def test_an_interrupted_replacement_of_a_checkpoint_is_undone(tmp_path):
    for name in ("step_00000002", ".step_00000002.old", ".step_00000004.old"):
        (tmp_path / name).mkdir()
    recover_folders(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000004"]


def test_the_best_checkpoint_is_chosen_by_the_better_ranking_and_records_which_it_was(tmp_path):
    trainer = TinyTrainer(tmp_path)
    found = iter([(10, 20), (24, 7), (15, 15)])  # r_mean by the dual encoder, re-ranked

    def evaluate(model, splits, label):
        dual_encoder, reranked = next(found)
        return {"val/": {"r_mean": reranked}, "val_emb/": {"r_mean": dual_encoder}}

    recorded = []
    for epoch in (1, 2, 3):
        trainer.state.step = trainer.engine.weight = trainer.state.epoch = epoch
        trainer._after_epoch(evaluate)
        recorded.append((trainer.state.best, trainer.state.best_step, load_weights(tmp_path).history.reranks))
    assert recorded == [(20, 1, True), (24, 2, False), (24, 2, False)]
    assert deciding_score({"val/": {"r_mean": 15}, "val_emb/": {"r_mean": 15}}, "val") == ("r_mean", 15)
    assert reranking_helps({"val/": {"r_mean": 15}, "val_emb/": {"r_mean": 15}}, "val") is False
    assert reranking_helps({"val_emb/": {"r_mean": 15}}, "val") is None
