"""The plan's arithmetic, and the plan beside real small runs: bytes and requests of an epoch, and the bottleneck."""

import json
import re
from dataclasses import replace

import pytest
from places import ROOT

from launch.plan import (
    CLIP,
    SETS,
    STEP_PARTS,
    Cluster,
    Medium,
    card_rate,
    main,
    make_plan,
    measure,
    relative_flops,
    smaller_epochs,
    training_seconds,
)  # fmt: skip
from loaders.config import CacheConfig, LoaderConfig, PerMedia
from sharding.shards.schema import read_corpus
from storage.limits import RemoteReads
from train.config.settings import RunConfig
from train.deepspeed.engine import find_deepspeed_config

pytestmark = pytest.mark.timeout(600)

LIMITS = {
    "GPU": {"gpu_rate": 1.0},
    "all-reduce": {"parameters": 1e12},
    "decode": {"decode_rate": 1.0},
    "network": {"node_gbit": 1e-4, "parameters": 1.0},
    "node's requests": {"node_requests": 0.1},
    "store's requests": {"store_requests": 0.1},
    "store's bytes": {"store_gbit": 1e-5},
}


@pytest.mark.parametrize("part", LIMITS)
def test_the_scarcest_part_binds(part):
    plan = make_plan(Medium(10_000, 8_000, 1, 9_000), replace(Cluster(), **LIMITS[part]), nodes=2)
    assert plan.bottleneck == part
    assert plan.seconds == (sum(plan.times[name] for name in STEP_PARTS) if part in STEP_PARTS else plan.times[part])


def test_an_epoch_by_hand():
    cluster = Cluster(gpu_rate=100, parameters=100e6, egress_gb=0.1)
    plan = make_plan(Medium(1_600_000, 10_000, 2, 50_000), cluster, nodes=4)
    assert plan.times["GPU"] == 500
    assert plan.egress_bytes == 16e9
    assert plan.requests == 3_200_000
    assert plan.times["store's requests"] == pytest.approx(3_200_000 / 5500)
    assert plan.times["network"] == pytest.approx(16 * 8 / 100)
    assert plan.times["all-reduce"] == pytest.approx(1_600_000 / 32 / 128 * 100e6 * 6 * 0.75 * 8e-9 / 25)
    hours = 10 * 3_200_000 / 5500 / 3600
    assert plan.cost["GPUs"] == pytest.approx(32 * hours * 2)
    assert plan.cost["egress"] == pytest.approx(16)
    assert plan.cost["requests"] == pytest.approx(12.8)
    assert plan.cost["storage"] == pytest.approx(1.84)


def test_the_all_reduce_adds_to_the_arithmetic_unless_it_overlaps():
    medium, cluster = SETS["webvid_14m"][0], Cluster(store_requests=1e9, node_requests=1e9)
    plan = make_plan(medium, cluster, 8)
    assert plan.bottleneck == "GPU"
    assert plan.seconds == pytest.approx(plan.times["GPU"] + plan.times["all-reduce"])
    assert plan.cost["GPUs"] == pytest.approx(64 * 10 * plan.seconds / 3600 * 2)
    hidden = make_plan(medium, replace(cluster, overlap=True), 8)
    assert hidden.seconds == pytest.approx(plan.times["GPU"] + plan.times["all-reduce"] / 3)  # weights go afterwards
    assert training_seconds(30, 60, overlap=True) == 70  # gradients go beside the backward pass only
    assert make_plan(medium, cluster, 1).times["all-reduce"] == 0


def test_epochs_at_smaller_images_take_their_share_of_the_arithmetic_but_no_less_than_the_data_needs():
    medium, cluster = Medium(1_000_000, 8_000, 1, 9_000), Cluster(efficiency=0.9)
    full = make_plan(medium, cluster, 1)
    assert full.seconds == pytest.approx(1_000_000 / (8 * 200 * 0.9))
    assert full.run_seconds == pytest.approx(10 * full.seconds)
    assert make_plan(medium, replace(cluster, gpus=1), 1).seconds == 1_000_000 / 200  # one GPU does not wait for others
    half = make_plan(medium, cluster, 1, [(0.5, 8)])
    assert half.run_seconds == pytest.approx((2 + 8 * 0.5) * full.seconds)
    bound = make_plan(medium, cluster, 1, [(1e-9, 8)])
    assert bound.run_seconds == pytest.approx(2 * full.seconds + 8 * full.times["node's requests"])
    assert half.cost["GPUs"] == pytest.approx(half.gpu_hours * 2) == 0.6 * full.cost["GPUs"]


def test_the_page_about_scaling_has_the_hours_of_the_planner():
    smaller = smaller_epochs(["112:8"], Cluster.epochs)
    rows = re.findall(r"^\| (webvid_\w+) \| (\w+) \| (\d) \| (.+) \|$", (ROOT / "docs/scaling.md").read_text(), re.M)
    assert len(rows) == 14
    for name, card, gpus, shown in rows:
        cluster = Cluster(
            gpus=int(gpus), gpu_rate=card_rate(card), efficiency=0.9, store_requests=1e9, node_requests=1e9
        )
        photos, clips = SETS[name]
        plans = [make_plan(photos + clips, cluster, 1, epochs) for epochs in ((), smaller)]
        cells = [f"{p.run_seconds / 3600:.1f} | {p.gpu_hours:.0f} | {p.cost['GPUs']:.0f}" for p in plans]
        assert shown == " | ".join(cells), (name, card, gpus)


def test_the_share_of_the_arithmetic_is_that_of_the_published_model():
    small, same = relative_flops([112, 224])
    assert same == 1
    assert 0.25 < small < 0.5  # a quarter of the image tokens, and all of the text


@pytest.mark.parametrize(("name", "overlaps"), [(RunConfig().deepspeed, False), ("deepspeed_configs/zero2.json", True)])
def test_the_shipped_configurations_overlap_as_the_planner_says(name, overlaps):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    section = json.loads(find_deepspeed_config(name).read_text())["zero_optimization"]
    assert DeepSpeedZeroConfig(**section).overlap_comm is overlaps
    assert Cluster().overlap is False  # the default runs reduce after the backward pass


def test_what_a_real_epoch_takes_is_what_was_planned(s3, shapes):
    """Measured on photos of one packed corpus, planned and then measured for another one and in another way."""
    few, many = s3.fill(shapes.url("images_test"), "few"), s3.fill(shapes.url("images_train"), "many")
    apart = LoaderConfig(batch_size=PerMedia(8, 8), image_res=32, remote=RemoteReads(gap_kb=0, hedge_percentile=0))
    medium, _ = measure([few], apart)
    assert medium.samples == 24
    found, _ = measure([many], apart)
    plan = make_plan(replace(medium, samples=found.samples), Cluster(), 1)
    assert found.samples * found.bytes_shown == pytest.approx(plan.egress_bytes, rel=0.35)
    assert found.samples * found.requests <= plan.requests
    assert found.bytes_stored > found.bytes_shown * 0.8


def test_the_cache_takes_photos_in_blocks_as_planned(s3, shapes, tmp_path):
    url = s3.fill(shapes.url("images_train"), "photos")
    config = LoaderConfig(batch_size=PerMedia(8, 8), image_res=32, cache=CacheConfig(str(tmp_path), 1.0))
    found, _ = measure([url], config)
    shards = read_corpus(url).shards
    assert found.requests * found.samples <= 2 * len(shards)  # an index, and a MiB that holds the whole shard
    assert found.bytes_shown * found.samples == pytest.approx(found.bytes_stored * 150, rel=0.2)


def test_on_a_slow_cable_the_network_binds_and_the_time_is_the_plans(hosts, corpora):
    hosts.fill(corpora / "images_train", "s3://plan/images_train")
    code = (
        "import json, sys; from dataclasses import asdict\n"
        "from launch.plan import measure; from loaders.config import *\n"
        "config = LoaderConfig(batch_size=PerMedia(8, 8), image_res=32, remote=RemoteReads(hedge_percentile=0))\n"
        "medium, seconds = measure(['s3://plan/images_train'], config)\n"
        "print(json.dumps([asdict(medium), seconds]))"
    )
    hosts.shape("node1", "tbf", "rate", "400kbit", "burst", "32kbit", "latency", "5s")
    try:
        reported, seconds = json.loads(hosts.run("node1", "python", "-c", code).stdout.splitlines()[-1])
    finally:
        hosts.shape("node1")
    plan = make_plan(Medium(**reported), Cluster(gpus=1, node_gbit=4e-4), 1)
    assert plan.bottleneck == "network"
    assert seconds >= 0.8 * plan.seconds


def test_the_command_prints_a_table_for_every_set(capsys):
    for name in SETS:
        assert main(["--set", name, "--nodes", "1", "64"]) == 0
        reported = capsys.readouterr().out
        assert "The GPUs are the bottleneck" in reported
        assert "The request rate of the store is the bottleneck" in reported
        assert main(["--set", name, "--cached", "--prefixes", "4", "--nodes", "64", "--json"]) == 0
        (plan,) = json.loads(capsys.readouterr().out)
        assert plan["nodes"] == 64
        assert plan["requests"] < 1.2 * CLIP.requests * 2_490_000
    assert main(["--set", "webvid_cc3m", "--card", "A100", "--nodes", "1", "--gpus", "1", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["times"]["GPU"] == pytest.approx(5_440_000 / (874 * 312 / 989))
    assert plan["gpu_hours"] == pytest.approx(plan["run_seconds"] / 3600) == plan["cost"]["GPUs"] / 2
    for words, reported in (
        (["--card", "Abacus"], "--card Abacus is not known"),
        (["--card", "A100", "--gpu-rate", "3"], "leave out one"),
        (["--efficiency", "0"], "--efficiency must be above 0"),
        (["--image-res", "112"], "must be SIZE:EPOCHS ..., such as 112:8, of not more than 10 epochs"),
        (["--image-res", "112:8", "160:3"], "of not more than 10 epochs"),
    ):
        assert main(["--set", "webvid_cc3m", *words]) == 2
        assert reported in capsys.readouterr().err
    assert main([]) == 2
    assert "name a training set" in capsys.readouterr().err
