"""Files and folders are written atomically, with the permissions of any new file."""

import errno
import os

import pytest

from storage.files import atomic_file, atomic_folder, remove_temporary, temporary_path, write_text


def half_written(path, error):
    """Write half of a file, or of a folder if `path` is one, and fail."""
    if path.is_dir():
        with atomic_folder(path) as temporary:
            (temporary / "new").write_text("half")
            raise error
    with atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_failed_write_leaves_the_earlier_file_or_folder(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
        (path / "old").touch()
    else:
        path.write_text("old")
    with pytest.raises(RuntimeError, match="a bug"):
        half_written(path, RuntimeError("a bug"))
    assert [each.name for each in tmp_path.iterdir()] == ["x"]
    assert os.listdir(path) == ["old"] if kind == "folder" else path.read_text() == "old"


def wrapped():
    """As PyTorch's writer fails on a full disk."""
    error = RuntimeError("unexpected pos 128 vs 22")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    return error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, ""), wrapped(), Exception("I/O (os error 28)")])
def test_errors_of_the_disk_name_the_file(tmp_path, error):
    with pytest.raises(OSError, match="No space left on device") as caught:
        half_written(tmp_path / "x", error)
    assert caught.value.filename == str(tmp_path / "x")


def test_an_error_about_another_file_is_not_changed(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_file(tmp_path / "x"):
        open("/nowhere")  # noqa: SIM115
    assert caught.value.filename == "/nowhere"


@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_permissions_are_those_of_new_files_and_a_folder_replaces_the_earlier_one(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "file", "text", sync=True)
        with atomic_file(tmp_path / "private") as temporary:
            temporary.chmod(0o600)
        for name in ("old", "new"):
            with atomic_folder(tmp_path / "folder") as temporary:
                (temporary / name).touch()
    finally:
        os.umask(before)
    assert os.listdir(tmp_path / "folder") == ["new"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.is_file()} == {0o666 & ~umask}
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


def test_temporary_files_of_killed_writers_are_removed(tmp_path):
    temporary_path(tmp_path / "a").mkdir()
    temporary_path(tmp_path / "b", "1").touch()
    temporary_path(tmp_path / "c", "link").symlink_to(tmp_path)
    remove_temporary(tmp_path)
    assert tmp_path.is_dir()
    assert not os.listdir(tmp_path)
