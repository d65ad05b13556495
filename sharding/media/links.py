"""Resolves links inside a tar: hard and symbolic ones, chains of them, and links to folders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

from sharding.media.tar import Member, plain, shown

LONGEST_CHAIN = 40  # links, as Linux follows


class Entry(Protocol):
    """A file or link of a tar."""

    @property
    def offset(self) -> int:
        """The byte position in the tar."""

    @property
    def link(self) -> bytes:
        """The path that it leads to; empty for a file."""

    @property
    def hard(self) -> bool:
        """Whether it is a hard link, which leads to an earlier member."""


Found = TypeVar("Found", bound=Entry)
Find = Callable[[bytes, int | None], Found | None]  # the last entry of a path, before an offset if one is given


class LinkError(ValueError):
    """A link that leads to no file."""


class Location(NamedTuple):
    """The position of a tar's member, or the target of a link."""

    offset: int
    size: int
    link: bytes
    hard: bool
    unreadable: str


class Locations:
    """The positions of the members of one tar, by path."""

    def __init__(self) -> None:
        self._locations: dict[bytes, list[Location]] = defaultdict(list)

    def add(self, member: Member) -> None:
        """Note the next member."""
        self._locations[member.path].append(
            Location(member.offset, member.size, member.link, member.hard, member.unreadable)
        )

    def find(self, path: bytes, before: int | None) -> Location | None:
        """The last member with a path, or the last one before an offset."""
        found = self._locations.get(path, [])
        return next((place for place in reversed(found) if before is None or place.offset < before), None)

    def target(self, link: Member) -> Location:
        """The file that a link leads to; raises LinkError when that is none."""
        try:
            return follow(link.link, self.find, link.offset if link.hard else None)
        except KeyError:
            raise LinkError(f"is a link to {shown(link.link)}, which is not in the archive") from None


def follow(path: bytes, find: Find[Found], before: int | None = None) -> Found:
    """The file at a path, at the end of whatever links lead to it; of several the last one, `before` an offset.

    Raises:
        KeyError: there is nothing of that path. LinkError: there is a link, but it leads to no file.
    """
    wanted, linked = path, False
    for _ in range(LONGEST_CHAIN):
        entry = find(wanted, before) or find(wanted, None)
        if entry is not None and not entry.link:
            return entry
        if entry is not None:
            wanted, before = entry.link, entry.offset if entry.hard else None
        else:
            turned = through_folder(wanted, find)
            if turned is None:
                break
            wanted, before = turned, None
        linked = True
    else:
        raise LinkError("is a link that leads to itself")
    if not linked:
        raise KeyError(path)
    raise LinkError(f"is a link to {shown(wanted)}, which is not in the archive")


def through_folder(path: bytes, find: Find[Found]) -> bytes | None:
    """Another path to the same, where a folder of it is a link; None where none is."""
    for place in (place for place, byte in enumerate(path) if byte == ord("/")):
        folder = find(path[:place], None)
        if folder is not None and folder.link:
            return plain(folder.link + path[place:])
    return None
