"""The doctor's judgements: which of several hosts is the odd one, and how it is told."""

from launch.findings import (
    BAD,
    OK,
    WARNING,
    Finding,
    clocks,
    compare,
    duration,
    hardware,
    lagging,
    links,
    table,
    versions,
)


def odd(findings):
    return [(finding.where, finding.verdict) for finding in findings if finding.verdict != OK]


def test_the_host_that_differs_from_most_is_the_odd_one():
    assert odd(compare("code", {"a": "x", "b": "y", "c": "y"}, "mend")) == [("a", BAD)]
    assert odd(compare("code", {"a": "x", "b": "y"}, "mend")) == [("b", BAD)]  # the first host counts
    assert compare("code", {"a": "x", "b": "x"}, "mend") == [Finding("code", "all", OK, "x")]


def test_a_package_that_one_host_lacks_is_told():
    facts = {
        "a": {"python": "3.11.7", "versions": {"torch": "2.13.0", "s3fs": "1"}},
        "b": {"python": "3.11.7", "versions": {"torch": "2.13.0"}},
        "c": {"python": "3.12.0", "versions": {"torch": "2.13.0", "s3fs": "1"}},
    }
    told = {(finding.where, finding.found) for finding in versions(facts)}
    assert told == {("c", "python 3.12.0; others python 3.11.7"), ("b", "s3fs missing; others s3fs 1")}


def test_a_host_with_fewer_gpus_is_told():
    facts = {name: {"gpus": ["H100"] * count, "cores": 8} for name, count in (("a", 8), ("b", 7), ("c", 8))}
    assert [finding.found for finding in hardware(facts)] == ["7 x H100; others 8 x H100"]


def test_clocks_may_differ_a_little():
    assert odd(clocks({"a": 0.1, "b": -1.0})) == []
    assert odd(clocks({"a": 0.0, "b": 5.0, "c": -400.0})) == [("b", WARNING), ("c", BAD)]


def test_links_and_hosts_far_below_the_others_hold_them_up():
    speeds = {("a", "b"): 20.0, ("b", "c"): 22.0, ("c", "a"): 6.0}
    assert odd(links(speeds, least=1.0)) == [("c -> a", BAD)]
    assert odd(links(speeds, least=21.0)) == [("a -> b", BAD), ("c -> a", BAD)]
    assert odd(lagging("loading", "/s", {"a": 100.0, "b": 40.0, "c": 90.0}, "mend", WARNING)) == [("b", WARNING)]


def test_the_table_tells_each_advice_once_and_wraps_what_is_long():
    long = "x " * 200
    text = table([Finding("reach", "a", BAD, long, "mend it"), Finding("reach", "b", BAD, "no", "mend it")])
    assert text.count("- mend it") == 1
    assert "2 things to mend before a job is started." in text
    assert max(map(len, text.splitlines())) <= 120
    assert "Nothing stands in a job's way." in table([Finding("reach", "all", OK, "2 hosts answer")])


def test_durations_for_people():
    assert [duration(seconds) for seconds in (3, 252, 5400, 90000, 260000)] == [
        "3 s",
        "4.2 min",
        "90 min",
        "25 h",
        "3.01 days",
    ]
