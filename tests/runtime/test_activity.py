"""Progress reported during calls of libraries that report none."""

import time

import pytest

from runtime import activity


def test_keep_alive_reports_progress_until_the_block_ends(monkeypatch):
    monkeypatch.setattr(activity, "REPORT_SECONDS", 0.01)
    seen = set()

    def fetch():
        deadline = time.monotonic() + 20
        while len(seen) < 3:
            assert time.monotonic() < deadline
            seen.add(activity.present_activity().since)
            assert activity.present_activity().position == "fetching a model"
            time.sleep(0.01)
        raise OSError("no network")

    with activity.keep_alive("fetching a model"), pytest.raises(OSError, match="no network"):
        fetch()
    last = activity.present_activity()
    time.sleep(0.1)
    assert activity.present_activity() is last
