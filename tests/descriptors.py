"""File descriptors above the limit of select(): `with many_descriptors(): ...`."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    """Open 1,100 descriptors, so that the next ones are above 1,023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    with contextlib.ExitStack() as stack:
        for _ in range(1100):
            stack.enter_context(open("/dev/null", "rb"))
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
