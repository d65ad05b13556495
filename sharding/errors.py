"""Errors that a user can mend, told in one line; anything else is a bug and shows its traceback."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

USER_ERROR = 2  # exit code
INTERRUPTED = 130
PROGRAM = Path(__file__).resolve().parent.parent
ROOMS = {"launch", "train", "eval", "loaders", "model", "sharding"}  # whose files are not the user's to mend

# What the operating system says of the user's disks, files and rights.
OF_THE_USER = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EIO, errno.EISDIR, errno.ELOOP,
    errno.EMFILE, errno.ENAMETOOLONG, errno.ENFILE, errno.ENODEV, errno.ENOENT, errno.ENOSPC, errno.ENOTDIR,
    errno.ENOTEMPTY, errno.EPERM, errno.EROFS, errno.ESTALE, errno.ETXTBSY, errno.EXDEV,
}  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT)


class UserError(ValueError):
    """What a user can mend. The message is one line: the thing, the reason, the remedy."""

    exit_code = USER_ERROR


class MissingError(UserError, FileNotFoundError):
    """Something that the user named does not exist."""


class AccessError(UserError, OSError):
    """Something that the user named cannot be read or written: rights, credentials, a store that does not answer."""


def user_message(error: BaseException) -> str | None:
    """The line that tells the user of an error; None where it is no error that a user can mend."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    number = os_error_number(error)
    if number not in OF_THE_USER or _is_ours(error):
        return None
    remedy = ": free some space, and run the same command again" if number in FULL else ""
    named = "".join(f"{name}: " for name in (getattr(error, "filename", None),) if name)
    return f"{named}{os.strerror(number)}{remedy}"


def os_error_number(error: BaseException) -> int | None:
    """The operating system's number of an error, also where a library in Rust has wrapped it; None where it has none.

    safetensors, for one, raises an error of its own that reads "... No space left on device (os error 28)".
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    wrapped = re.search(r"\(os error (\d+)\)", str(error))
    return int(wrapped[1]) if wrapped else None


def _is_ours(error: BaseException) -> bool:
    """Whether an error is about a file of this program."""
    name = getattr(error, "filename", None)
    return isinstance(name, str) and any(PROGRAM / room in Path(name).absolute().parents for room in ROOMS)


def run_command(body: Callable[[], int], interrupted: str = "interrupted") -> int:
    """The exit code of a command: `body`'s, 2 with one line where the user can mend it, 130 after Ctrl-C.

    Other errors show their traceback and end with 1.
    """
    try:
        return body()
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
