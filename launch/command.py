"""Common code of the entry points: command line, logging, and errors shown once, in one line."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import NoReturn

from runtime.errors import ROOMS, USER_ERROR, UserError, user_message
from runtime.program import command_line, subcommands
from runtime.ranks import Ranks, ranks_from_environment
from train.config.settings import Settings, load_settings
from train.job.interrupted import TrainingInterrupted

log = logging.getLogger("launch")

NOISY = ("huggingface_hub", "transformers", "timm")  # they repeat, at length, what our own messages say

OTHERS_WAIT = 10.0  # seconds in which other ranks let rank 0 report an error

_kept = MemoryHandler(100_000, flushLevel=logging.CRITICAL + 1)

STARTED_AS_SCRIPT = """\
start it with
  one process a GPU    deepspeed {option} CONFIG.yaml key=value ...
  two on the CPU       DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 {option} ...
  N processes          torchrun --nproc_per_node N {script} ...
  a single process     python {script} ...
  many nodes           sbatch {folder}/slurm/*.sbatch ..., deepspeed --hostfile, ...: docs/launching.md

"""
STARTED_AS_SUBCOMMAND = """\
start it with
  one process a GPU    {prog} CONFIG.yaml key=value ...
  two on the CPU       DS_ACCELERATOR=cpu {prog} --num_accelerators 2 CONFIG.yaml ...
  many nodes           {prog} --hostfile HOSTS CONFIG.yaml ..., sbatch {folder}/slurm/*.sbatch ...: docs/launching.md
  another launcher     torchrun --nproc_per_node N --no-python {prog} CONFIG.yaml ...

Options before CONFIG.yaml are those of `deepspeed`.

"""
EPILOG = """\
settings are those of the YAML, as dotted keys: optimizer.lr=1e-5 batch_size.image=64 "splits=[val,test]"
docs/settings.md lists them all."""


class _Parser(argparse.ArgumentParser):
    """Reports errors of the command line like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def parser(script: str, description: str) -> argparse.ArgumentParser:
    """The command line of an entry point: a configuration and settings."""
    path = Path(script)
    module = f"launch.{path.stem}"
    words = {"script": f"launch/{path.name}", "option": f"launch/{path.name}", "folder": path.parent.name}
    if module in subcommands or getattr(sys.modules["__main__"], "__spec__", None):  # by `python -m`, as from a wheel
        words = {"script": f"-m {module}", "option": f"--module {module}", "folder": str(path.parent)}
    started = STARTED_AS_SUBCOMMAND if module in subcommands else STARTED_AS_SCRIPT
    prog = command_line(module) if module in subcommands else f"python {words['script']}"
    result = _Parser(
        prog=prog,
        usage=f"{prog} [options of deepspeed] CONFIG.yaml [key=value ...]" if module in subcommands else None,
        description=description,
        epilog=started.format(prog=prog, **words) + EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("config", metavar="CONFIG.yaml", help="a configuration, for example one of configs/")
    result.add_argument(
        "settings", nargs="*", metavar="key=value", default=[], help="settings that override the configuration"
    )
    result.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return result


def run(
    script: str,
    description: str,
    body: Callable[[Settings, Ranks], None],
    logs: str = "",
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Run an entry point and exit: 0 done, 2 an error of the user, 128 + signal stopped by it, 1 a bug.

    body: imports what it needs itself, so that errors in the settings show before PyTorch is loaded. logs: the folder
    below output_dir with the log of a failure. arguments: of the command line; None: those of this process.
    """
    ranks, folder = Ranks(), None
    try:
        ranks = ranks_from_environment()
        set_up_logging(ranks)
        options = parser(script, description).parse_args(arguments)
        settings = load_settings(options.config, options.settings)
        if settings.config.output_dir is not None:
            folder = Path(settings.config.output_dir) / logs
        count = f"{ranks.world_size} processes" if ranks.world_size > 1 else "1 process"
        log.info("launch/%s %s, %s: loading PyTorch and DeepSpeed", Path(script).name, options.config, count)
        body(settings, ranks)
    except TrainingInterrupted as interruption:
        log.info("%s", interruption)
        end(128 + interruption.signal)
    except KeyboardInterrupt:
        if ranks.is_first:
            sys.stderr.write("interrupted\n")
        end(128 + signal.SIGINT)
    except Exception as error:
        fail(error, ranks, folder)
    end(0)


def fail(error: Exception, ranks: Ranks, folder: Path | None) -> NoReturn:
    """Report an error and exit: in one line where the user can fix it, else with its traceback.

    The log of the rank in `folder` gets the traceback in any case.
    """
    trace = traceback.format_exc().rstrip()
    log.debug("%s", trace)
    message = user_message(error)
    rank = "" if ranks.is_first else f"rank {ranks.rank}: "
    if not ranks.is_first or "by peer" in str(error):  # another rank may be the cause, or report the same
        let_others_report(OTHERS_WAIT if ranks.local_rank == 0 or ranks.num_nodes == 1 else 2 * OTHERS_WAIT)
    if not ranks.is_first and folder is not None and folder.is_dir():
        log_to_file(folder, ranks)
    if message is not None:
        sys.stderr.write(f"error: {rank}{message}\n")
        end(error.exit_code if isinstance(error, UserError) else USER_ERROR)
    sys.stderr.write(f"{rank}{trace}\n")
    end(1)


def let_others_report(seconds: float) -> None:
    """Wait for another rank, with the same error or its cause, to report it: the launcher then ends this one."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: end(1))
    time.sleep(seconds)


def end(code: int) -> NoReturn:
    """Exit without waiting for threads that an error may have left."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def set_up_logging(ranks: Ranks) -> None:
    """Log to the console, all of rank 0 and warnings of the others; keep the messages until there is a log file."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
    handler.setLevel(logging.INFO if ranks.is_first else logging.WARNING)
    for name in ROOMS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
        logger.addHandler(_kept)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)


def log_to_file(folder: Path, ranks: Ranks) -> None:
    """Log to a file below `folder` as well, from the start, with dates and tracebacks: log.txt of rank 0,
    logs/rank_00001.txt of rank 1.
    """
    path = (folder / "log.txt" if ranks.is_first else folder / "logs" / f"rank_{ranks.rank:05}.txt").absolute()
    loggers = [logging.getLogger(name) for name in ROOMS]
    if any(getattr(each, "baseFilename", None) == str(path) for each in loggers[0].handlers):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _kept.setTarget(handler)
    _kept.flush()
    for logger in loggers:
        logger.removeHandler(_kept)
        logger.addHandler(handler)
