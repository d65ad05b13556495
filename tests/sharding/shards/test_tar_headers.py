"""Headers of shards equal those of Python's tarfile."""

import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.shards.writing import tar_header


def of_tarfile(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=100), st.integers(0, 8**11 - 1))
def test_headers_of_any_name_and_size(name: str, size: int) -> None:
    name = name.strip("/") or "x"
    assert tar_header(name, size) == of_tarfile(name, size)


@pytest.mark.parametrize("name", ["a" * 100, "b" * 60 + "/" + "c" * 60, "été.jpg", "a?b.json", "000001000002.007.jpg"])
@pytest.mark.parametrize("size", [0, 1, 511, 2**30, 8**11 - 1])
def test_headers_of_long_and_non_ascii_names(name: str, size: int) -> None:
    assert tar_header(name, size) == of_tarfile(name, size)


def test_a_size_beyond_the_header_is_an_error() -> None:
    with pytest.raises(ValueError, match="overflow"):
        tar_header("a", 8**11)
