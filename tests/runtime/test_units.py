"""Durations and sizes in a suitable unit."""

import pytest

from runtime.units import data_size, duration


@pytest.mark.parametrize(
    ("function", "texts"),
    [
        (
            duration,
            {0.01: "0 s", 0.42: "0.4 s", 3: "3 s", 252: "4.2 min", 5400: "90 min", 90000: "25 h", 260000: "3.01 days"},
        ),
        (
            data_size,
            {7: "7 bytes", 1500: "1.5 kB", 999_999: "1.0 MB", 1.2e9: "1.2 GB", 3.4e15: "3,400.0 TB"},
        ),
    ],
)
def test_text_for_people(function, texts):
    assert {number: function(number) for number in texts} == texts
