"""A user error is one line; a bug shows its traceback."""

import errno
import os
import pickle
from pathlib import Path

import fsspec
import pytest

import sharding
from runtime.errors import AccessError, MissingError, UserError, WorkerError, command, user_message


def ending(error: BaseException) -> int:
    """The exit code of a command that raises an error."""

    @command("stopped")
    def main() -> int:
        raise error

    return main()


@pytest.mark.parametrize("kind", [UserError, MissingError, AccessError, WorkerError])
def test_an_error_of_the_user_is_one_line(kind, capsys):
    error = pickle.loads(pickle.dumps(kind("a is wrong:\n  take b")))  # as worker processes send it
    assert ending(error) == 2
    assert capsys.readouterr().err == "error: a is wrong: take b\n"


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a"), OSError("nothing of the system"), IndexError()])
def test_a_bug_shows_its_traceback(error, capsys):
    assert ending(error) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert type(error).__name__ in shown


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_what_to_do(number, capsys):
    assert ending(OSError(number, os.strerror(number), "/runs/a")) == 2
    line = f"error: {os.strerror(number)}: '/runs/a': free some space and run the same command again to continue\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("url", ["nosuch://bucket/a", "hdfs3x://a/b"])
def test_a_protocol_that_fsspec_does_not_know_is_named(url, capsys):
    with pytest.raises(ValueError, match="Protocol not known") as failed:
        fsspec.url_to_fs(url)
    message = user_message(failed.value)
    assert message
    assert url.partition(":")[0] in message


def _read(url: str) -> None:
    files, path = fsspec.url_to_fs(url)
    files.cat_file(path)


@pytest.mark.parametrize("url", ["http://[::1/a", "s3://[bucket/a", "http://host:port/a", "http://host:99999/a"])
def test_a_malformed_url_is_one_line(url):
    with pytest.raises(ValueError, match=r"Invalid|Port") as failed:
        _read(url)
    assert user_message(failed.value) == str(failed.value)


def test_a_missing_file_of_the_program_is_a_bug_and_one_of_the_user_is_not():
    ours = Path(sharding.__file__).parent / "templates" / "gone.html"
    assert user_message(FileNotFoundError(errno.ENOENT, "No such file or directory", str(ours))) is None
    theirs = user_message(FileNotFoundError(errno.ENOENT, "No such file or directory", "data/captions.json"))
    assert theirs == "No such file or directory: 'data/captions.json'"


def test_ctrl_c_ends_with_130(capsys):
    assert ending(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "stopped\n"
