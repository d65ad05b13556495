"""JSON that programs write and parsers refuse (NaN, half surrogate pairs, huge numbers), as a stream they accept."""

from __future__ import annotations

import re
from typing import IO

BLOCK = 2**16  # bytes read at a time
SLICE = 2**12  # bytes that are looked at for nesting at a time
DEEPEST = 1000  # brackets opened and not closed within a slice; the parser's memory grows with the square of the depth
LONGEST_TOKEN = 2**26  # bytes of a string that is not closed

# A string, or the text between two of them. In a string a pair of surrogates has to be taken before a half.
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[^"]+', re.DOTALL)
HALF = re.compile(rb"\\\\|(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})|\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
PAIR = 12  # bytes of a pair of surrogates
SURROGATE = re.compile(rb"\\u[dD]")
LONE_HIGH = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")
NOT_A_NUMBER = re.compile(rb"(?<![\w.+-])(?:-?Infinity|NaN)(?![\w.])")
NUMBER = re.compile(rb"(?<![\w.+-])-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w.+-])")


class Unparsable(Exception):
    """JSON that the parser would misread; the message is the reason."""


class CheckedJson:
    """A file as it is; raises Unparsable where parsers fill the memory, or misread half a pair of surrogates."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.tail = b""  # bytes before those that come next

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        data = self.file.read(BLOCK if size < 0 else size)
        check_depth(data)
        text = self.tail + data
        if b"\\" in text and SURROGATE.search(text):  # the first is quick, and most files have none
            last = len(text) - PAIR if data else len(text)  # the rest arrives with the next bytes
            if any(match.start() <= last for match in LONE_HIGH.finditer(text)):
                raise Unparsable("it holds half a pair of surrogates")
        self.tail = text[-2 * PAIR :]
        return data


class RepairedJson:
    """A file in which NaN and infinity are null, half a pair of surrogates is "?", and numbers too large are texts."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.held = b""  # the beginning of a token that may continue

    def read(self, size: int = -1) -> bytes:
        """The next bytes, any number of them; none at the end alone."""
        if size == 0:
            return b""
        while True:
            data = self.file.read(BLOCK)
            check_depth(data)
            text = self.held + data
            end = len(text) if not data or len(text) > LONGEST_TOKEN else last_end(text)
            self.held = text[end:]
            if end or not data:
                return TOKEN.sub(repaired, text[:end])


class Located:
    """A stream that tracks the parser's position: after `slow` bytes it returns one byte at a time."""

    def __init__(self, stream: CheckedJson | RepairedJson, slow: float) -> None:
        self.stream, self.slow = stream, slow
        self.seen = self.last = 0  # bytes handed over; those before the last piece
        self.line, self.column = 1, 0
        self._held = b""

    def read(self, size: int = -1) -> bytes:
        """The next bytes, any number of them; none at the end alone."""
        if size == 0:
            return b""
        self._held = self._held or self.stream.read(size)
        piece = self._held if self.seen + len(self._held) <= self.slow else self._held[:1]
        self._held = self._held[len(piece) :]
        self.last, self.seen = self.seen, self.seen + len(piece)
        broken = piece.count(b"\n")
        self.line += broken
        self.column = len(piece) - piece.rfind(b"\n") - 1 if broken else self.column + len(piece)
        return piece


def check_depth(data: bytes) -> None:
    """Raise Unparsable where more brackets are opened than any annotations do."""
    if data.count(b"[") + data.count(b"{") > DEEPEST:
        for start in range(0, len(data), SLICE):
            part = data[start : start + SLICE]
            if part.count(b"[") + part.count(b"{") - part.count(b"]") - part.count(b"}") > DEEPEST:
                raise Unparsable("it is nested too deeply")


def last_end(text: bytes) -> int:
    """End of the last complete token of `text`, which begins outside of a string."""
    end = 0
    for match in TOKEN.finditer(text):
        if match.start() != end:  # a string that is not closed yet
            return end
        if match.end() == len(text) and match[0][:1] != b'"':
            cut = max(match[0].rfind(sign) for sign in (b",", b"[", b"{", b":", b"\n", b" "))
            return match.start() + cut + 1
        end = match.end()
    return end


def repaired(match: re.Match[bytes]) -> bytes:
    """A token as parsers accept it."""
    token = match[0]
    if token[:1] != b'"':
        return NUMBER.sub(storable_number, NOT_A_NUMBER.sub(b"null", token))
    return HALF.sub(keep_pair, token) if b"\\u" in token else token


def keep_pair(match: re.Match[bytes]) -> bytes:
    """A pair of surrogates, or a backslash, as it is; "?" for half a pair."""
    return match[0] if match[1] or match[0] == b"\\\\" else b"?"


def storable_number(match: re.Match[bytes]) -> bytes:
    """A number; as text where it does not fit into 64 bits."""
    number = match[0]
    if number.lstrip(b"-").isdigit():
        return number if len(number) < 19 else b'"%b"' % number
    return number if abs(float(number)) < 1e308 else b"null"
