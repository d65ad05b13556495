"""The house rules that a reader relies on: imports point one way, and the packing room starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

FLOORS = ("runtime", "storage", "sharding", "preprocessing", "loaders model", "eval", "train", "launch")
MAY_IMPORT = {
    room: {below for lower in FLOORS[:number] for below in lower.split()}
    for number, floor in enumerate(FLOORS)
    for room in floor.split()
}
# Attributes of DeepSpeed's engine, optimisers and parameters that it does not document; besides those named ds_*.
UNDOCUMENTED = {
    "_global_grad_norm", "_hp_mapping", "averaged_gradients", "basic_optimizer", "bit16_groups",
    "checkpoint_event_epilogue", "checkpoint_event_prologue", "fp16_groups", "fp32_groups",
    "fp32_partitioned_groups_flat", "global_steps", "grad_partitions_flat_buffer", "loss_scale_config", "loss_scaler",
    "overflow", "parameter_offload", "persistent_parameters", "single_partition_of_fp32_groups", "skipped_steps",
    "update_lp_params",
}  # fmt: skip
MAY_READ_UNDOCUMENTED = {ROOT / "train/deepspeed/compat.py", ROOT / "train/deepspeed/state.py"}
SOURCES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}


def imported_rooms(path: Path) -> set[str]:
    """The project's top-level packages that a file imports or starts, wherever in the file, also by a string."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            rooms |= {node.value.split(".")[0]} if node.value in MODULES else set()
        by_name = isinstance(node, ast.Name | ast.Attribute) and "import_module" in ast.unparse(node)
        assert not by_name or path == ROOT / "runtime/plugins.py", path
        if isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            rooms.add(node.module.split(".")[0])
    return rooms & set(MAY_IMPORT)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    assert imported_rooms(path) - {room} <= MAY_IMPORT[room]


def test_no_file_imports_itself_by_way_of_others() -> None:
    imports: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        found = {node.module for node in nodes} | {
            f"{node.module}.{each.name}" for node in nodes for each in node.names
        }
        imports[name] = found & set(MODULES) - {name}
    while leaves := [name for name, others in imports.items() if not others & imports.keys()]:
        imports = {name: others for name, others in imports.items() if name not in leaves}
    assert not imports, "these import each other"


def read_attributes(path: Path) -> set[str]:
    """Names of attributes that a file reads or sets, also by getattr, hasattr and setattr."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            names |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return {name for name in names if isinstance(name, str)}


def test_undocumented_attributes_of_deepspeed_are_read_in_two_files() -> None:
    paths = {*SOURCES, *(ROOT / "benchmarks").glob("*.py")}
    found = {
        (path.relative_to(ROOT), name)
        for path in paths - MAY_READ_UNDOCUMENTED
        for name in read_attributes(path)
        if name in UNDOCUMENTED or name.startswith("ds_")
    }
    assert not found
    assert UNDOCUMENTED & set().union(*map(read_attributes, MAY_READ_UNDOCUMENTED))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_its_job_and_is_one_room(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{path} opens without a docstring"
    assert text.count("\n") <= 450, f"{path} is too long to read in one sitting"


def test_packing_starts_without_torch() -> None:
    program = "import sys, sharding.build, sharding.inspect, sharding.verify; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("number", range(6))
def test_folders_of_sharding_import_one_way(number: int) -> None:
    folders = ("shapes", "annotations", "media", "shards", "executors", "report")
    above = {f"sharding.{folder}" for folder in folders[number + 1 :]}
    for path in (ROOT / "sharding" / folders[number]).rglob("*.py"):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not above & {".".join((node.module or "").split(".")[:2]) for node in imports}, path
