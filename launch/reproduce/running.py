"""Runs the commands of a row whose results are not there yet."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from launch.reproduce.steps import Command, Reproduction, num_samples

PROGRAM = Path(__file__).resolve().parent.parent / "console.py"  # `singularity`, which need not be on the PATH


def run(task: Reproduction) -> int:
    """Run the commands in their order; returns 0, or the exit code of the first that fails."""
    for step in task.commands():
        done = is_done(task, step)
        sys.stdout.write(f"{'# done: ' if done else ''}{step}\n")
        sys.stdout.flush()
        if done:
            continue
        if step.name == "finetune" and not _finished(task).is_file():  # an unfinished run says so itself
            record(task, step)
        code = subprocess.run([sys.executable, str(PROGRAM), *step.words]).returncode
        if code:
            sys.stderr.write(
                f"`singularity {step.name}` failed with exit code {code}: solve it, then start the row again\n"
            )
            return code
        if step.name == "evaluate":
            record(task, step)
    return 0


def is_done(task: Reproduction, step: Command) -> bool:
    """Whether the result of a command is there: a corpus, a finished run of the same command, metrics of the same
    command, weights and test corpora.
    """
    if step.corpus:
        return num_samples(step.corpus) is not None
    result = task.metrics_file if step.name == "evaluate" else _finished(task)
    return result.is_file() and recorded(task).get(step.name) == fingerprint(task, step)


def fingerprint(task: Reproduction, step: Command) -> str:
    """A digest of a command and of what it reads."""
    digest = hashlib.sha256(str(step).encode())
    if step.name == "evaluate":
        from sharding.shards.schema import read_corpus

        weights = _finished(task) if task.train else _file_of(task.weights())
        facts = weights.stat()
        digest.update(f"{facts.st_size} {facts.st_mtime_ns}".encode())
        for url in task.evaluation.test_urls().values():
            digest.update(read_corpus(url).to_json().encode())
    return digest.hexdigest()


def _finished(task: Reproduction) -> Path:
    """What a finished fine-tuning has written."""
    return task.run_folder / "finished.json"


def _file_of(weights: str) -> Path:
    """A file that changes with the weights, which may also be a run or a folder."""
    from model.checkpoints.files import TENSORS, resolve_weights

    path = resolve_weights(weights)
    return path / TENSORS if path.is_dir() else path


def _state_file(task: Reproduction) -> Path:
    """Beside the run's folder: fine-tuning starts in an empty one."""
    return task.run_folder.with_name(f"{task.run_folder.name}.json")


def recorded(task: Reproduction) -> dict[str, str]:
    """Subcommand -> fingerprint of those that `record` has recorded."""
    path = _state_file(task)
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def record(task: Reproduction, step: Command) -> None:
    """Remember the fingerprint of a command."""
    task.output.mkdir(parents=True, exist_ok=True)
    _state_file(task).write_text(json.dumps(recorded(task) | {step.name: fingerprint(task, step)}), encoding="utf-8")
