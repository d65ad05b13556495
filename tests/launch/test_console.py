"""`singularity SUBCOMMAND`: what it lists, starts, completes and imports."""

import os
import re
import subprocess
import sys

import pytest
from needs import lacks, leave_out
from places import ROOT

from launch.console import GROUPS, MODULES, SHELLS, completion, keep_working_folder_out, main
from runtime.program import as_started, subcommands

HEAVY = {"torch", "deepspeed", "transformers", "timm", "tokenizers", "matplotlib", "aiohttp", "ray"}
MAY_IMPORT_PYARROW = ("compare",)


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """The command changes its process, which here is that of the tests."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    before = dict(subcommands)
    yield
    subcommands.clear()
    subcommands.update(before)


def test_every_command_of_the_pages_is_a_subcommand():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"python -m ((?:[a-z]+)\.[a-z.]+[a-z])", page.read_text())}
    of_developers = {"train.config.page", "launch.reproduce.page", "tests.parity", "launch.doctor.probe", "launch.api"}
    entry_points = {f"launch.{path.stem}" for path in (ROOT / "launch").glob("finetune_*.py")}  # both are `finetune`
    assert named - of_developers - entry_points <= set(MODULES.values())


def test_the_page_lists_the_subcommands():
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| `(.+)` \|$", (ROOT / "docs/commands.md").read_text(), re.MULTILINE)
    listed = {(name, sentence, command.split()[-1]) for name, sentence, command in rows}
    assert listed == {(name, text, module) for group in GROUPS.values() for name, (module, text) in group.items()}


def test_help_needs_none_of_the_heavy_packages():
    program = """
import contextlib, io, os, sys
from launch.console import MODULES, main
os._exit = sys.exit
for name in sorted(MODULES, key=sys.argv[1:].__contains__):
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        main([name, "--help"])
    assert shown.getvalue().startswith(f"usage: singularity {name} "), shown.getvalue()
    print(name, *{module.partition(".")[0] for module in sys.modules})
"""
    words = [sys.executable, "-c", program, *MAY_IMPORT_PYARROW]  # these last: what is imported stays
    result = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    imported = {name: set(modules) for name, *modules in map(str.split, result.stdout.splitlines())}
    assert set(imported) == set(MODULES)
    for name, modules in imported.items():
        assert not HEAVY & modules, name
        assert "pyarrow" not in modules or name in MAY_IMPORT_PYARROW, name


def test_help_and_version_list_what_there_is(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in MODULES)
    assert main(["--version"]) == 0
    assert re.search(r"^torch \d", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pakc"], "there is no subcommand 'pakc': nearest is pack"),
        (["completion", "tcsh"], "name your shell: singularity completion bash|zsh|fish"),
        (["inspect", "nowhere"], "`singularity pack`"),
        (["report", "nowhere"], "evaluate it first with singularity evaluate"),
    ],
)
def test_errors_are_one_line_and_name_subcommands(words, said, capsys, tmp_path, monkeypatch):
    (tmp_path / "nowhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_messages_name_modules_where_a_module_is_started():
    text = "see `python -m sharding.verify URL` and launch/evaluate.py"
    subcommands.clear()
    assert as_started(text) == text
    subcommands["sharding.verify"] = "verify"
    assert as_started(text) == "see `singularity verify URL` and launch/evaluate.py"


@pytest.mark.parametrize("path", ["/x/launch/pretrain.py", "my-launch/pretrain.py", "launch/pretrain.pyc"])
def test_messages_name_the_users_paths_as_they_are(path):
    subcommands["launch.pretrain"] = "pretrain"
    assert as_started(f"{path} or launch/pretrain.py.") == f"{path} or singularity pretrain."


def test_the_working_folder_is_taken_from_the_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH")
    (tmp_path / "link").symlink_to(tmp_path)
    names = ["", ".", str(tmp_path), str(tmp_path / "link")]
    monkeypatch.setenv("PYTHONPATH", ":".join([*names, "/kept"]))  # DeepSpeed's launcher sets it on several nodes
    sys.path[:0] = [*names, "/kept"]
    keep_working_folder_out()
    assert sys.path[0] == os.environ["PYTHONPATH"] == "/kept"
    assert os.environ["PYTHONSAFEPATH"] == "1"


def test_a_wrong_setting_shows_before_processes_start(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(os, "execv", lambda *words: pytest.fail("processes are started"))
    assert main(["pretrain", "--num_accelerators", "2", str(ROOT / "configs/pretrain.yaml"), "optimizer.lrr=1"]) == 2
    assert "unknown key 'optimizer.lrr': nearest are optimizer.lr" in capsys.readouterr().err


def test_settings_before_the_configuration_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(os, "execv", lambda *words: pytest.fail("processes are started"))
    assert main(["pretrain", "optimizer.lr=1", "configs/pretrain.yaml"]) == 2
    assert "optimizer.lr=1 stands before configs/pretrain.yaml: settings come after it" in capsys.readouterr().err


SRUN = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "DS_ACCELERATOR": "cuda"}


@pytest.mark.parametrize(
    ("environment", "options", "launches"),
    [
        ({"DS_ACCELERATOR": "cuda"}, [], True),
        ({"DS_ACCELERATOR": "cpu"}, ["--num_accelerators=2", "--hostfile", "HOSTS"], True),
        ({"DS_ACCELERATOR": "cpu"}, [], False),
        ({"DS_ACCELERATOR": "cuda", "RANK": "0", "WORLD_SIZE": "2"}, [], False),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, [], True),  # srun --pty bash
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}, [], False),
    ],
)
def test_processes_are_started_where_none_are(environment, options, launches, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    monkeypatch.setattr("launch.command.run", lambda *_: sys.exit("in this process"))
    config = str(ROOT / "configs/pretrain.yaml")
    if not launches:
        with pytest.raises(SystemExit, match="in this process"):
            main(["pretrain", *options, config, "optimizer.lr=1"])
        return
    main(["pretrain", *options, config, "optimizer.lr=1"])
    (words,) = started
    script = str(ROOT / "launch/console.py")
    assert words[1:] == ["-m", "deepspeed.launcher.runner", *options, "--no_local_rank", script, "pretrain", config,
                         "optimizer.lr=1"]  # fmt: skip


COMPLETED = {
    "singularity pre": "pretrain preview",
    "singularity pack --media-t": "--media-type",
    "singularity pack --media-type ": "image video",
    "singularity pretrain any.yaml optimizer.w": "optimizer.weight_decay=",
}
IN_BASH = """
source completion; compopt() { :; }
while IFS= read -r COMP_LINE; do
  read -ra COMP_WORDS <<<"$COMP_LINE"; [[ $COMP_LINE != *" " ]] || COMP_WORDS+=("")
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
  _singularity singularity "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
  echo "${COMPREPLY[@]}"
done"""
IN_FISH = "source completion; while read -l line; echo (complete -C $line | string replace -r '\\t.*' ''); end"
PROGRAMS = {"bash": IN_BASH, "fish": IN_FISH, "zsh": None}


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_complete_subcommands_options_and_settings(shell, tmp_path):
    leave_out(lacks(shell))
    (tmp_path / "completion").write_text(completion(shell))
    if shell == "zsh":  # completes in a terminal only
        subprocess.run(["zsh", "-n", "completion"], cwd=tmp_path, check=True)
        return
    lines = "".join(f"{line}\n" for line in COMPLETED)
    words = [shell, "-c", PROGRAMS[shell]]
    result = subprocess.run(words, cwd=tmp_path, input=lines, capture_output=True, text=True)
    found = [" ".join(sorted(line.split())) for line in result.stdout.splitlines()]
    assert found == list(COMPLETED.values()), result.stderr
