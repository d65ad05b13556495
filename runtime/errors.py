"""User errors, reported in one line with the remedy; any other error is a bug and shows its traceback."""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec

from runtime.program import as_started

USER_ERROR = 2  # exit code
INTERRUPTED = 130
PROGRAM = Path(__file__).resolve().parent.parent
# Our packages.
ROOMS = {"launch", "train", "eval", "loaders", "model", "preprocessing", "sharding", "storage", "runtime"}

# Errors of the user's disks, files and permissions.
USER_ERRNOS = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP,
    errno.EMFILE, errno.ENAMETOOLONG, errno.ENFILE, errno.ENODEV, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR,
    errno.ENOTEMPTY, errno.EPERM, errno.EROFS, errno.ESTALE, errno.ETXTBSY, errno.EXDEV,
}  # fmt: skip
# Modules whose errors are about user input: an unknown protocol, a missing package for one, a malformed URL.
INPUT_MODULES = {"fsspec.registry", "urllib.parse", "yarl._parse"}
FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """An error that the user can fix. The message is one line: the thing, the reason, the remedy."""

    exit_code = USER_ERROR


class MissingError(UserError, FileNotFoundError):
    """Something that the user named does not exist."""


class AccessError(UserError, OSError):
    """Something that the user named cannot be read or written: permissions, credentials, an unavailable store."""


class WorkerError(UserError, ChildProcessError):
    """A worker process died."""


def user_message(error: BaseException) -> str | None:
    """The line that reports a user error; None for a bug."""
    if isinstance(error, UserError):
        return as_started(" ".join(str(error).split()))
    if _raised_in(error) in INPUT_MODULES and isinstance(error, ValueError | ImportError):
        return " ".join(str(error).split())
    number = os_error_number(error)
    if number not in USER_ERRNOS or _is_ours(error):
        return None
    filename = getattr(error, "filename", None)
    named = f": {filename!r}" if filename else ""
    remedy = ": free some space and run the same command again to continue" if number in FULL else ""
    return f"{os.strerror(number)}{named}{remedy}"


def _raised_in(error: BaseException) -> str:
    """Name of the module that raised an error."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""


@contextmanager
def file_errors(path: object, written_as: object = None) -> Iterator[None]:
    """Make errors of the operating system name `path` where they name nothing, as that of a full disk does.

    So do errors that a library has wrapped, and those that name `written_as`, where `path` is being written, or a file
    in it.
    """
    try:
        yield
    except Exception as error:
        number = None if isinstance(error, UserError) else _number_behind(error)
        filename = getattr(error, "filename", None)
        temporary = written_as is not None and str(filename).startswith(str(written_as))
        if number is None or not (filename is None or temporary):
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def _number_behind(error: BaseException | None) -> int | None:
    """As `os_error_number`, also where PyTorch's writer raised a RuntimeError while it handled the system's error."""
    number = os_error_number(error) if error is not None else None
    if number is None and isinstance(error, RuntimeError):
        return _number_behind(error.__context__)
    return number


def os_error_number(error: BaseException) -> int | None:
    """The operating system's number of an error, also where a library in Rust has wrapped it; None where it has none.

    safetensors, for one, raises its own error, which reads "... No space left on device (os error 28)".
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    wrapped = re.search(r"\(os error (\d+)\)", str(error))
    return int(wrapped[1]) if wrapped else None


def _is_ours(error: BaseException) -> bool:
    """Whether an error is about a file of this program."""
    name = getattr(error, "filename", None)
    return isinstance(name, str) and any(PROGRAM / room in Path(name).absolute().parents for room in ROOMS)


Arguments = ParamSpec("Arguments")


def command(interrupted: str = "interrupted") -> Callable[[Callable[Arguments, int]], Callable[Arguments, int]]:
    """Decorate the `main` of a command: a user error prints one line and exits with 2, Ctrl-C exits with 130.

    Any other error prints its traceback and exits with 1. interrupted: what is printed after Ctrl-C.
    """

    def decorate(main: Callable[Arguments, int]) -> Callable[Arguments, int]:
        @functools.wraps(main)
        def run(*arguments: Arguments.args, **settings: Arguments.kwargs) -> int:
            try:
                return main(*arguments, **settings)
            except KeyboardInterrupt:
                sys.stderr.write(f"{interrupted}\n")
                return INTERRUPTED
            except Exception as error:
                message = user_message(error)
                if message is None:
                    traceback.print_exc()
                    return 1
                sys.stderr.write(f"error: {message}\n")
                return error.exit_code if isinstance(error, UserError) else USER_ERROR

        return run

    return decorate
