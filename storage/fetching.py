"""The settings of downloads of media from web servers."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import UserError
from runtime.flags import flag, positive

ATTEMPTS = 4  # of a request, by default
LARGEST_MB = {"image": 128, "video": 4096}  # images are fetched to memory, clips to disk
LONGEST = {"image": 600.0, "video": 7200.0}  # seconds that a transfer may take, with the usual timeout
USUAL_TIMEOUT = 30.0


@dataclass(frozen=True)
class Bounds:
    """Limits of one transfer."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Fetching:
    """Settings of downloads of media; they do not change the result."""

    connections: int = flag(16, "concurrent connections of each process (default: %(default)s)")
    per_host: int = flag(8, "concurrent connections of each process to one server (default: %(default)s)")
    attempts: int = flag(ATTEMPTS, "tries of a request that fails with a transient error (default: %(default)s)")
    timeout: float = flag(
        USUAL_TIMEOUT,  # seconds with fewer than SLOWEST bytes per second
        "seconds almost without data before a connection is closed (default: %(default)s)",
        metavar="SECONDS",
    )
    max_mb: int = flag(  # of one body, decompressed; 0: LARGEST_MB
        0,
        "maximum size of a response (default: {image} for images, {video} for videos)".format(**LARGEST_MB),
        type=positive,
        metavar="MB",
    )

    def bounds(self, media_type: str) -> Bounds:
        """Limits of one medium: a server's response may be endless, or arrive at one byte per second."""
        largest = (self.max_mb or LARGEST_MB[media_type]) * 10**6
        return Bounds(largest, LONGEST[media_type] * max(1.0, self.timeout / USUAL_TIMEOUT))

    def check(self) -> None:
        """Raise ValueError, with the remedy, for settings that cannot work."""
        if self.max_mb < 0:
            raise UserError(f"--max-mb is {self.max_mb}, must be at least 1")
        if min(self.connections, self.per_host, self.attempts) < 1 or self.timeout <= 0:
            raise UserError("--connections, --per-host and --attempts must be at least 1, --timeout above 0")
