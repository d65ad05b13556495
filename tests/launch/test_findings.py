"""The doctor's judgements: which of several hosts differs, and the line that reports it."""

import pytest

from launch.doctor.findings import (
    BAD,
    OK,
    WARNING,
    Finding,
    clocks,
    compare,
    decoding,
    gpus,
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


def test_a_package_that_one_host_lacks_is_reported():
    facts = {
        "a": {"python": "3.11.7", "versions": {"torch": "2.13.0", "s3fs": "1"}},
        "b": {"python": "3.11.7", "versions": {"torch": "2.13.0"}},
        "c": {"python": "3.12.0", "versions": {"torch": "2.13.0", "s3fs": "1"}},
    }
    reported = {(finding.where, finding.found) for finding in versions(facts)}
    assert reported == {("c", "python 3.12.0; others python 3.11.7"), ("b", "s3fs missing; others s3fs 1")}


def test_a_host_with_fewer_gpus_is_reported():
    facts = {name: {"gpus": ["H100"] * count, "cores": 8} for name, count in (("a", 8), ("b", 7), ("c", 8))}
    assert [finding.found for finding in hardware(facts)] == ["7 x H100; others 8 x H100"]


def host(cards=1, driver="580.65.06", fault="", dali=("nvidia-dali-cuda130",), cuda="13.0"):
    """The facts of a host with GPUs."""
    versions = {"CUDA of torch": cuda, "NCCL": "2.29.7", **dict.fromkeys(dali, "2.4.0")}
    return {"gpus": ["NVIDIA H200"] * cards, "gpu_fault": fault, "driver": driver, "versions": versions}


def reported(facts):
    return [(finding.check, finding.verdict, finding.found) for finding in gpus({"a": facts})]


def test_a_gpu_is_reported_with_its_versions():
    card = ("GPU", OK, "8 x NVIDIA H200, driver 580.65.06, CUDA of torch 13.0, NCCL 2.29.7")
    assert reported(host(8)) == [card, ("DALI", OK, "nvidia-dali-cuda130")]
    assert reported({**host(0), "versions": {}}) == [("GPU", OK, "no GPU: the CPU computes and decodes")]


def test_a_gpu_that_pytorch_cannot_use_is_reported_with_the_remedy():
    fault = "this host has an NVIDIA GPU, but PyTorch cannot use it; update the driver; or set DS_ACCELERATOR=cpu"
    (finding,) = gpus({"a": host(0, fault=fault)})
    assert (finding.verdict, finding.found) == (BAD, "this host has an NVIDIA GPU, but PyTorch cannot use it")
    assert finding.advice == "update the driver; or set DS_ACCELERATOR=cpu"


@pytest.mark.parametrize(
    ("dali", "cuda", "driver", "verdict", "text"),
    [
        ((), "13.0", "580.65", WARNING, "not installed: the CPU decodes"),
        (("nvidia-dali-cuda120",), "12.8", "550.54", OK, "nvidia-dali-cuda120"),
        (("nvidia-dali-cuda120",), "13.0", "580.65", WARNING, "beside a PyTorch for CUDA 13: decode=dali is refused"),
        (("nvidia-dali-cuda130",), "12.8", "550.54", BAD, "for CUDA 12; CUDA 13 needs driver 580 or newer"),
        (("nvidia-dali-cuda130",), "12.8", "", WARNING, "beside a PyTorch for CUDA 12"),
        (("nvidia-dali-cuda120", "nvidia-dali-cuda130"), "13.0", "580.65", BAD, "overwrite each other's files"),
    ],
)
def test_dali_must_be_built_for_the_cuda_of_pytorch(dali, cuda, driver, verdict, text):
    _, finding = gpus({"a": host(dali=dali, cuda=cuda, driver=driver)})
    assert finding.verdict == verdict
    assert text in finding.found
    assert verdict == OK or f"`make install DALI=cuda{cuda[:2]}`" in finding.advice


def test_nccl_must_be_the_same_everywhere():
    facts = {name: {"python": "3.12", **host()} for name in ("a", "b", "c")}
    facts["b"]["versions"] = {**facts["b"]["versions"], "NCCL": "2.27.5"}
    assert [finding.found for finding in versions(facts)] == ["NCCL 2.27.5; others NCCL 2.29.7"]


@pytest.mark.parametrize(
    ("backend", "levels", "fallback", "verdict", "text"),
    [
        ("cpu", 0.6, "", OK, "CPU, 0.60 grey levels from the picture"),
        ("dali", 0.7, "", OK, "DALI on the GPU, 0.70 grey levels from the CPU's pixels"),
        ("dali", 40.0, "", BAD, "DALI on the GPU: a picture is 40.00 grey levels from the CPU's pixels"),
        ("cpu", 40.0, "", BAD, "CPU: a picture is 40.00 grey levels from the picture"),
        ("cpu", 0.6, "DALI cannot be imported: no libcuda", WARNING, "no libcuda; the CPU decodes"),
    ],
)
def test_a_picture_must_come_out_as_it_is(backend, levels, fallback, verdict, text):
    (finding,) = decoding({"a": {"backend": backend, "levels": levels, "fallback": fallback}})
    assert finding.verdict == verdict
    assert finding.found.endswith(text)
    assert bool(finding.advice) == (verdict != OK)


def test_clocks_may_differ_a_little():
    assert odd(clocks({"a": 0.1, "b": -1.0})) == []
    assert odd(clocks({"a": 0.0, "b": 5.0, "c": -400.0})) == [("b", WARNING), ("c", BAD)]


def test_links_and_hosts_far_below_the_others_hold_them_up():
    speeds = {("a", "b"): 20.0, ("b", "c"): 22.0, ("c", "a"): 6.0}
    assert odd(links(speeds, least=1.0)) == [("c -> a", BAD)]
    assert odd(links(speeds, least=21.0)) == [("a -> b", BAD), ("c -> a", BAD)]
    assert odd(lagging("loading", "/s", {"a": 100.0, "b": 40.0, "c": 90.0}, "mend", WARNING)) == [("b", WARNING)]


def test_the_table_shows_each_advice_once_and_wraps_what_is_long():
    long = "x " * 200
    text = table([Finding("reach", "a", BAD, long, "mend it"), Finding("reach", "b", BAD, "no", "mend it")])
    assert text.count("- mend it") == 1
    assert "2 problems to fix before a job is started." in text
    assert max(map(len, text.splitlines())) <= 120
    assert "No problem found." in table([Finding("reach", "all", OK, "2 hosts answer")])
