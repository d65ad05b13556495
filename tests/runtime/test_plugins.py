"""Modules of users are found, imported once, and cannot take a name that is in use."""

import sys
from pathlib import Path

import pytest

from preprocessing.frames import FRAME_SAMPLERS
from runtime.errors import MissingError, UserError
from runtime.plugins import Registry, load_plugins


@pytest.fixture(autouse=True)
def _restore_imports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def test_a_registry_chooses_by_name() -> None:
    registry: Registry[int] = Registry("colour")
    assert registry("red")(1) == 1
    assert registry["red"] == 1
    assert list(registry) == ["red"]
    assert "red" in registry
    assert "blue" not in registry
    with pytest.raises(UserError, match=r"colour is 'rad', must be one of red; .* plugins"):
        registry["rad"]
    with pytest.raises(UserError, match="colour=red exists already"):
        registry("red")(2)
    registry("blue")(2)
    with pytest.raises(UserError, match="colour is 'rad', must be one of red, blue;"):
        registry["rad"]


@pytest.mark.parametrize("name", ["first_plugin", "a_package.second_plugin"])
@pytest.mark.parametrize("where", ["work", "yaml"])
def test_a_plugin_is_found_in_the_working_folder_and_beside_the_yaml(name: str, where: str, tmp_path: Path) -> None:
    file = tmp_path / where / f"{name.replace('.', '/')}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_name("beside_it.py").write_text("count = [0]\n")
    module = "beside_it" if "." not in name else "a_package.beside_it"
    file.write_text(f"from {module} import count\ncount[0] += 1\n")
    load_plugins([name], tmp_path / "yaml")
    load_plugins([name], tmp_path / "yaml")
    assert sys.modules[module].count == [1]


def test_a_plugin_beside_a_yaml_below_the_working_folder_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "work" / "experiment"
    folder.mkdir()
    (folder / "plugin_below.py").write_text("")
    load_plugins(["plugin_below"], Path("experiment"))
    assert sys.path[-1] == str(folder)


def test_what_is_registered_again_replaces_itself() -> None:
    registry: Registry[type] = Registry("colour")
    kinds = [type("Red", (), {"__module__": "a_notebook"}) for _ in range(2)]
    for kind in kinds:
        registry("red")(kind)
    assert registry["red"] is kinds[1]
    with pytest.raises(UserError, match="colour=red exists already"):
        registry("red")(type("Red", (), {"__module__": "elsewhere"}))


def test_a_plugin_that_failed_may_be_imported_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FRAME_SAMPLERS, "_known", {})
    plugin = Path("mended_plugin.py")
    text = "from preprocessing.frames import FRAME_SAMPLERS\n@FRAME_SAMPLERS('mended')\ndef mended(): ...\n"
    plugin.write_text(f"{text}missing\n")
    with pytest.raises(NameError):
        load_plugins(["mended_plugin"])
    plugin.write_text(text)
    load_plugins(["mended_plugin"])


@pytest.mark.parametrize("name", ["__main__", "5"])
def test_what_is_not_the_name_of_a_plugin_is_one_clear_error(name: str) -> None:
    with pytest.raises(UserError, match=f"plugins names '{name}': write the name of a module"):
        load_plugins([name])


def test_a_plugin_may_be_an_installed_module() -> None:
    load_plugins(["colorsys"])


def test_a_missing_plugin_names_the_folders(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=f"no nowhere.py in {tmp_path / 'work'} or {tmp_path}, and no such package"):
        load_plugins(["nowhere"], tmp_path)


def test_a_file_with_the_name_of_another_module_is_refused() -> None:
    Path("model.py").write_text("")
    with pytest.raises(UserError, match=r"plugins names model, which .*work/model.py is, but also .*: rename"):
        load_plugins(["model"])
    with pytest.raises(UserError, match=r"plugins names 'my_losses\.py': write the name of a module without"):
        load_plugins(["my_losses.py"])


def test_an_error_in_a_plugin_is_not_hidden() -> None:
    Path("faulty_plugin.py").write_text("import nothing_of_the_kind\n")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_the_kind"):
        load_plugins(["faulty_plugin"])
