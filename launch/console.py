"""The console command `singularity SUBCOMMAND`: each one runs a module that `python -m` runs as well."""

from __future__ import annotations

import argparse
import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if not __package__:  # started by its path, as a rank
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime.errors import UserError, command
from runtime.program import subcommands
from runtime.ranks import started_by_launcher

ROOT = str(Path(__file__).resolve().parent.parent)
# Subcommand -> module and what it does.
GROUPS = {
    "data": {
        "pack": ("sharding.build", "pack images or videos with their texts into webdataset shards"),
        "index": ("sharding.index", "index webdataset shards that other tools wrote, in place"),
        "inspect": ("sharding.inspect", "show statistics, samples, pictures and failures of a packed corpus"),
        "verify": ("sharding.verify", "check a packed corpus byte by byte, and repair it"),
        "shapes": ("sharding.shapes", "generate a small data set of coloured shapes with captions"),
        "vocab": ("loaders.vocab", "learn a WordPiece vocabulary from packed corpora"),
        "filters": ("train.filters", "make the filters of vision_encoder.type=patch_filters from photos"),
        "answers": ("sharding.answers", "list the answers to rank, from the questions of packed corpora"),
        "preview": ("loaders.preview", "draw the first batch of an epoch as the model sees it"),
        "bench": ("loaders.bench", "measure the loader on this machine and name the bottleneck"),
    },
    "training and evaluation": {
        "pretrain": ("launch.pretrain", "pre-train on images and videos with their captions"),
        "finetune": ("launch.finetune", "fine-tune for retrieval, question answering or multiple choice, and evaluate"),
        "evaluate": ("launch.evaluate", "evaluate a checkpoint"),
        "reproduce": ("launch.reproduce", "repeat a row of the paper's tables and compare the numbers"),
    },
    "results": {
        "report": ("eval.report", "write an HTML page about evaluations"),
        "compare": ("eval.compare", "compare two evaluations query by query"),
        "search": ("eval.search", "search packed images or clips by text"),
        "plot": ("train.plot", "draw the curves of runs"),
        "export": ("model.export", "write a model as an official checkpoint or as a folder"),
    },
    "clusters": {
        "doctor": ("launch.doctor", "examine a cluster and its storage before a job starts"),
        "plan": ("launch.plan", "estimate time, requests and cost of an epoch on N nodes"),
    },
}
MODULES = {name: module for group in GROUPS.values() for name, (module, _) in group.items()}
TRAINING = {"pretrain": "", "finetune": "", "evaluate": "evaluation"}  # -> the folder of logs below output_dir
SHELLS = ("bash", "zsh", "fish")
# bash puts a space after a completed word, which must not follow `optimizer.lr=`.
NO_SPACE = """
_singularity() { _shtab_singularity "$@"; [[ ${COMPREPLY[0]-} != *= ]] || compopt -o nospace; }
complete -o bashdefault -F _singularity singularity
"""
RELATED = ("torch", "deepspeed", "timm", "transformers", "nvidia-dali-cuda120", "nvidia-dali-cuda130")


def overview() -> str:
    """The text of `singularity --help`."""
    lines = ["usage: singularity SUBCOMMAND ...", "", "Video-and-language pre-training as a streaming system."]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<10} {sentence}" for name, (_, sentence) in group.items())]
    lines += ["", "`singularity SUBCOMMAND --help` lists its options; `singularity --version`; shell completion:"]
    return "\n".join([*lines, f"`singularity completion {'|'.join(SHELLS)}`.", ""])


def versions() -> str:
    """The installed versions of this package and of those that results depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("singularity-at-scale", *RELATED):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found += [f"{name} (not installed)"] if name not in RELATED else []
    return "\n".join([*found, f"Python {sys.version.split()[0]}, {ROOT}", ""])


def keep_working_folder_out() -> None:
    """Keep files of the working folder, such as model.py, from replacing modules, here and in processes started here.

    DeepSpeed's launcher prepends the folder to PYTHONPATH on several nodes. Modules named in `plugins` are found still.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    here = os.path.realpath("")
    if here == ROOT:
        return
    if "PYTHONPATH" in os.environ:
        paths = os.environ["PYTHONPATH"].split(os.pathsep)
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if os.path.realpath(path) != here)
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != here]


def train(name: str, arguments: Sequence[str]) -> int:
    """Run a subcommand of TRAINING: in this process where a launcher has started it or one process is enough, else
    by DeepSpeed's launcher. Options before the configuration are the launcher's.
    """
    from launch.command import parser, run
    from train.config.settings import load_settings
    from train.job.gpus import gpu_files, gpus_hidden

    entry = pkgutil.resolve_name(MODULES[name])
    words = list(arguments)
    first = next((i for i, word in enumerate(words) if word.endswith((".yaml", ".yml")) and word[0] != "-"), 0)
    if first and words[0][:1] != "-":
        raise UserError(f"{words[0]} stands before {words[first]}: settings come after it")
    asks_gpu = os.environ.get("DS_ACCELERATOR", "cuda" if gpu_files() and not gpus_hidden() else "cpu") != "cpu"
    if started_by_launcher() or not (first or asks_gpu) or {"-h", "--help"} & set(words):
        run(entry.__file__, entry.__doc__, entry.main, TRAINING[name], words)
    options = parser(entry.__file__, entry.__doc__).parse_args(words[first:])
    load_settings(options.config, options.settings)  # errors show before processes start
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *words[:first], "--no_local_rank"]
    # Its ranks run this file, by its absolute path; then RANK is set, and they train in their own process.
    os.execv(sys.executable, [*launcher, str(Path(__file__).resolve()), name, *words[first:]])


def completion(shell: str) -> str:
    """A script that completes subcommands, options and settings in a shell."""
    import shtab

    result = argparse.ArgumentParser("singularity")
    result.add_argument("--version", action="store_true")
    subparsers = result.add_subparsers()
    for group in GROUPS.values():
        for name, (module, sentence) in group.items():
            own: Any = (
                training_parser(module) if name in TRAINING else pkgutil.resolve_name(f"{code_of(module)}:parser")()
            )
            for action in own._actions:  # argparse has no other way to list them
                if action.nargs != 0 and not action.choices and action.type not in (int, float):
                    action.complete = shtab.FILE
            subparsers.add_parser(name, parents=[own], add_help=False, help=sentence)
    subparsers.add_parser("completion", help="print a script for a shell").add_argument("shell", choices=SHELLS)
    return shtab.complete(result, shell) + (NO_SPACE if shell == "bash" else "")


def training_parser(module: str) -> argparse.ArgumentParser:
    """The command line of a subcommand of TRAINING, with every setting as a choice."""
    from launch.command import parser
    from runtime.settings import declarations
    from train.config.settings import RunConfig

    entry = pkgutil.resolve_name(module)
    result = parser(entry.__file__, entry.__doc__)
    (settings,) = (action for action in result._actions if action.dest == "settings")
    settings.choices = [f"{key}=" for key in declarations(RunConfig)]
    return result


def code_of(module: str) -> str:
    """The module with the `main` of a command."""
    spec = find_spec(module)
    assert spec is not None, module
    return f"{module}.__main__" if spec.submodule_search_locations else module


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, that of the module."""
    if sys.platform != "linux":
        raise UserError(f"this runs on Linux only, not on {sys.platform}: use WSL 2, a container or a Linux machine")
    keep_working_folder_out()
    subcommands.update({module: name for name, module in MODULES.items()})
    subcommands.update({"launch.finetune_retrieval": "finetune", "launch.finetune_qa": "finetune"})
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        sys.stdout.write(overview())
    elif name == "--version":
        sys.stdout.write(versions())
    elif name == "completion":
        if len(rest) != 1 or rest[0] not in SHELLS:
            raise UserError(f"name your shell: singularity completion {'|'.join(SHELLS)}")
        sys.stdout.write(completion(rest[0]))
    elif name in TRAINING:
        return train(name, rest)
    elif name in MODULES:
        code: int = pkgutil.resolve_name(f"{code_of(MODULES[name])}:main")(rest)
        return code
    else:
        from runtime.settings import listed_nearest, nearest

        listed = listed_nearest(near) if (near := nearest(name, MODULES)) else "see `singularity --help`"
        raise UserError(f"there is no subcommand {name!r}: {listed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
