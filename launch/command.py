"""What all entry points share: the command line, logging, and mistakes told once, in one line."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from train.config_files import Settings, load_settings
from train.ranks import Ranks, ranks_from_environment
from train.stopped import Stopped

log = logging.getLogger("launch")

ROOMS = ("launch", "train", "eval", "loaders", "model", "sharding")
NOISY = ("huggingface_hub", "transformers", "timm")  # they tell again, at length, what our own messages say

USER_ERROR = 2
OTHERS_WAIT = 10.0  # seconds in which a rank leaves it to the first one to tell what is wrong

EPILOG = """\
start it with
  one process a GPU    deepspeed {deepspeed} CONFIG.yaml key=value ...
  two on the CPU       DS_ACCELERATOR=cpu deepspeed --num_accelerators 2 {deepspeed} ...
  N processes          torchrun --nproc_per_node N {python} ...
  a single process     python {python} ...
  many nodes           sbatch {folder}/slurm/*.sbatch ..., deepspeed --hostfile, ...: docs/launching.md

settings are those of the YAML, as dotted keys: optimizer.lr=1e-5 batch_size.image=64 "splits=[val,test]"
docs/training.md lists them all."""


class _Parser(argparse.ArgumentParser):
    """Tells mistakes as everything else here does."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(f"{message}; `python {self.prog} --help` tells how to start it")


def parse(script: str, description: str) -> argparse.Namespace:
    """The command line of an entry point: a configuration and settings."""
    path = Path(script)
    name = option = f"launch/{path.name}"
    folder = path.parent.name
    if getattr(sys.modules["__main__"], "__spec__", None):  # by `python -m`, as from a wheel
        name, option, folder = f"-m launch.{path.stem}", f"--module launch.{path.stem}", str(path.parent)
    parser = _Parser(
        prog=name,
        description=description,
        epilog=EPILOG.format(deepspeed=option, python=name, folder=folder),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="a configuration, for example one of configs/")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that replace the configuration's")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher's
    return parser.parse_args()


def run(script: str, description: str, body: Callable[[Settings, Ranks], None]) -> NoReturn:
    """Run an entry point and end the process: 0 done, 2 a mistake of the user's, 128 + signal stopped by it.

    body: imports what it needs itself, so that mistakes in the settings show before PyTorch is there.
    """
    ranks = Ranks()
    try:
        ranks = ranks_from_environment()
        set_up_logging(ranks)
        options = parse(script, description)
        body(load_settings(options.config, options.settings), ranks)
    except Stopped as stopped:
        log.info("%s", stopped)
        end(128 + stopped.signal)
    except (ValueError, OSError) as error:
        log.debug("%s", traceback.format_exc())
        tell(" ".join(str(error).split()), "error: ", ranks, wait=not ranks.is_first)
        end(USER_ERROR)
    except KeyboardInterrupt:
        end(128 + signal.SIGINT)
    except Exception as error:
        text = traceback.format_exc().rstrip()
        log.debug("%s", text)
        tell(text, "", ranks, wait=not ranks.is_first or "by peer" in str(error))
        end(1)
    end(0)


def tell(message: str, prefix: str, ranks: Ranks, wait: bool) -> None:
    """Print a failure. wait: another rank may be its cause or tell it; the launcher then ends this one meanwhile."""
    if wait:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: end(1))
        time.sleep(OTHERS_WAIT)
    rank = "" if ranks.is_first else f"rank {ranks.rank}: "
    sys.stderr.write(f"{prefix}{rank}{message}\n")


def end(code: int) -> NoReturn:
    """End the process without waiting for threads that a failure may have left."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def set_up_logging(ranks: Ranks) -> None:
    """Our messages to the console: all of the first rank's, warnings of the others."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
    handler.setLevel(logging.INFO if ranks.is_first else logging.WARNING)
    for name in ROOMS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)


def log_to_file(path: Path) -> None:
    """Our messages, with dates and the traces of failures, to the run's log as well."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ROOMS:
        logging.getLogger(name).addHandler(handler)
