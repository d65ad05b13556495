"""`benchmarks/gpu_results.py`: lines of JSON of limited length."""

import json

from benchmarks.gpu_results import figures, fitted


def test_results_are_the_lines_of_json_in_the_output():
    assert figures('words\n{"a": 1}\n{"cut": ') == {"a": 1}
    assert figures('{"a": 1}\n{"b": 2}\n') == [{"a": 1}, {"b": 2}]
    assert figures("words\n") == ["words"]


def test_the_longest_results_stay_in_the_archive():
    results = [{"part": "long", "figures": "x" * 500}, {"part": "short", "figures": {"rate": 1}}]
    long, short = map(json.loads, fitted(results, 300))
    assert long["figures"] == "in results.tgz, long.txt"
    assert short["figures"] == {"rate": 1}
    assert fitted(results, 1000) == [json.dumps(entry) for entry in results]
    assert len(fitted(results, 1)) == 2  # it ends where nothing can be shortened
