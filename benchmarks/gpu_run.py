"""Runs a small training as users do: stopped by SIGTERM, resumed, evaluated; against an uninterrupted run.

    python benchmarks/gpu_run.py data/photos --tokenizer vocab.txt --output runs/gpu_run --precision bf16

Prints one line of JSON: how the stop ended, the step it resumed at, the final losses of both runs, recall on the
corpus, seconds of each part. The output of the commands is in OUTPUT/*.log. Exit code 1 if a command fails, a step is
missing or repeated, or the final losses differ by more than 10 %. `deterministic_equal` is informative only: whether
two short runs with deterministic=true and precision=bf16 log the same metrics bit for bit; instead of false it may
contain the error that ended one of them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STOPPED = 128 + signal.SIGTERM
LARGEST_DIFFERENCE = 0.1  # of the last losses, relative: the order of sums differs between runs on a GPU
POLL_SECONDS = 0.05
TWINS = ("twin_1", "twin_2")
# Dropout and bf16, as for large models: the demo has neither.
OF_TWINS = ("deterministic=true", "decode=cpu", "precision=bf16", "text_encoder.dropout=0.1", "max_steps=10")


def computed(record: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a logged step that do not depend on time: losses and gradient norm."""
    return {name: value for name, value in record.items() if name.startswith("loss") or name in ("step", "grad_norm")}


class Commands:
    """The entry points with this run's settings."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.output, self.steps = options.output, options.steps
        zero = "zero1" if options.precision == "bf16" else "cpu"
        self.settings = [
            f"train_corpus={options.corpus}", f"test_corpus.photos={options.corpus}", "splits=[photos]",
            f"tokenizer={options.tokenizer}", f"precision={options.precision}", f"max_steps={options.steps}",
            f"deepspeed=deepspeed_configs/{zero}.json", f"batch_size.image={options.batch}", f"k_test={options.k_test}",
            "scheduler.epochs=1000", "log_every=1",
        ]  # fmt: skip

    def start(self, script: str, name: str, *more: str) -> subprocess.Popen[bytes]:
        """Start an entry point on the run folder `name` with its output in `name`.log."""
        command = [
            sys.executable, f"launch/{script}.py", "configs/demo/pretrain.yaml", *self.settings,
            f"output_dir={self.output / name}", *more,
        ]  # fmt: skip
        with open(self.output / f"{name}.log", "ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def last_line(self, name: str) -> str:
        """The last line printed by the commands on a run folder."""
        return ((self.output / f"{name}.log").read_text().strip() or "no output").splitlines()[-1]

    def logged(self, name: str) -> list[dict[str, Any]]:
        """The steps logged so far."""
        path = self.output / name / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [record for record in records if "loss" in record]

    def twins_are_equal(self, twins: list[subprocess.Popen[bytes]]) -> bool | str:
        """Whether two runs logged the same metrics; if one failed, its last line."""
        for name, process in zip(TWINS, twins, strict=True):
            if process.wait():
                return f"{name}: exit code {process.returncode}: {self.last_line(name)}"
        first, second = ([computed(record) for record in self.logged(name)] for name in TWINS)
        return bool(first) and first == second

    def stop_at(self, name: str, step: int) -> int:
        """Start a run, send SIGTERM after that step and return its exit code."""
        process = self.start("pretrain", name)
        while process.poll() is None:
            if any(record["step"] >= step for record in self.logged(name)):
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(POLL_SECONDS)
        return process.wait()


def run_all(commands: Commands) -> dict[str, Any]:
    """Run all commands; returns the results."""
    seconds: dict[str, float] = {}
    result: dict[str, Any] = {}

    def timed(name: str, run: str, command: Callable[[], int], expected: int = 0) -> None:
        began = time.perf_counter()
        code = result[f"exit_{name}"] = command()
        seconds[name] = round(time.perf_counter() - began, 1)
        if code != expected:
            raise SystemExit(f"{name}: exit code {code} instead of {expected}: {commands.last_line(run)}")

    timed("stopped", "resumed", lambda: commands.stop_at("resumed", commands.steps // 3), STOPPED)
    before = commands.logged("resumed")
    timed("resumed", "resumed", lambda: commands.start("pretrain", "resumed").wait())
    twins = [commands.start("pretrain", name, *OF_TWINS) for name in TWINS]  # concurrent: most time is start-up
    try:
        timed("whole", "whole", lambda: commands.start("pretrain", "whole").wait())
        result["deterministic_equal"] = commands.twins_are_equal(twins)
    finally:
        for process in twins:
            process.kill()
    weights = f"checkpoint={commands.output / 'resumed'}"
    timed("evaluated", "resumed", lambda: commands.start("evaluate", "resumed", weights).wait())
    resumed, whole = commands.logged("resumed"), commands.logged("whole")
    result |= {"stopped_after": before[-1]["step"] if before else 0, "steps": [record["step"] for record in resumed]}
    result |= {"first_loss": resumed[0]["loss"], "last_loss": resumed[-1]["loss"], "whole_loss": whole[-1]["loss"]}
    metrics = json.loads((commands.output / "resumed" / "metrics.json").read_text())
    result["r_mean"] = {name: row["r_mean"] for name, row in metrics.items()}
    return result | {"seconds": seconds}


def checked(found: dict[str, Any], steps: int) -> dict[str, Any]:
    """The result with its list of steps checked, and whether all is correct."""
    difference = abs(found["last_loss"] / found["whole_loss"] - 1)
    complete = found.pop("steps") == list(range(1, steps + 1))
    fine = complete and difference <= LARGEST_DIFFERENCE
    return found | {"every_step_once": complete, "difference": f"{difference:.1e}", "ok": fine}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("corpus", metavar="URL", help="a packed corpus of images with captions")
    result.add_argument("--tokenizer", required=True, help="a vocab.txt")
    result.add_argument("--output", type=lambda text: Path(text).resolve(), required=True, help="a folder; emptied")
    result.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    result.add_argument("--batch", type=int, default=64, help="(default: %(default)s)")
    result.add_argument("--steps", type=int, default=60, help="(default: %(default)s)")
    result.add_argument("--k_test", type=int, default=32, help="candidates re-ranked (default: %(default)s)")
    return result


def main() -> int:
    options = parser().parse_args()
    if options.output.exists():
        shutil.rmtree(options.output)
    options.output.mkdir(parents=True)
    options.corpus, options.tokenizer = (str(Path(p).resolve()) for p in (options.corpus, options.tokenizer))
    found = checked(run_all(Commands(options)), options.steps)
    print(json.dumps(found))
    return int(not found["ok"])


if __name__ == "__main__":
    sys.exit(main())
