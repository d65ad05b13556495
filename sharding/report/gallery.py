"""One self-contained HTML page to look at a corpus: its distributions, and samples with their texts."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from PIL import Image

from runtime.charts import histogram_svg
from sharding.report.contact_sheet import jpeg, read_picture, side_by_side
from sharding.report.samples import Picked, fetch_command
from sharding.report.statistics import Distribution, Statistics, bin_names, short, summary
from sharding.shards.schema import Corpus

FRAME_HEIGHT = 180  # pixels of a clip's frames on the page
PLAIN = 8.0  # standard deviation of a frame's values, of 256, up to which there is nothing to see


def gallery(corpus: Corpus, statistics: Statistics, picked: Sequence[Picked], failures: Counter[str]) -> str:
    """The page; `failures` by kind of reason."""
    environment = Environment(
        loader=PackageLoader("sharding.report"),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("gallery.html.j2").render(
        corpus=corpus,
        facts=summary(corpus),
        statistics=statistics,
        charts=[chart(each) for each in statistics.distributions if each.low < each.high],
        constants={each.name: short(each.low) for each in statistics.distributions if each.low == each.high},
        failures=failures,
        cards=[card(corpus, sample) for sample in picked],
    )


def chart(distribution: Distribution) -> dict[str, Any]:
    """A histogram as the page draws it."""
    bins = distribution.bins()
    counts = dict(zip(bin_names(bins), (count for _, _, count in bins)))
    open_bins = [name for name, (low, high, _) in zip(counts, bins) if math.isinf(high - low)]
    five, ninety_five = distribution.percentile(0.05), distribution.percentile(0.95)
    return {
        "name": distribution.name,
        "median": short(distribution.percentile(0.5)),
        "mean": f"{distribution.mean:,.3g}" if distribution.mean < 1000 else short(distribution.mean),
        "outer": f"{short(five)} to {short(ninety_five)}" if five != ninety_five else "",
        "ends": f"{short(distribution.low)} to {short(distribution.high)}",
        "svg": histogram_svg(distribution.name, counts, open_bins),
    }


def card(corpus: Corpus, sample: Picked) -> dict[str, Any]:
    """A sample for the page: its frames side by side in one data URL."""
    row = sample.row
    images = [read_picture(data) for data in sample.frames]
    readable = [image for image in images if image is not None]
    whole = readable[0] if len(readable) == 1 else side_by_side(equal_frames(readable)) if readable else None
    target = f"{row['key'].rsplit('/', 1)[-1]}.jpg"
    return {
        "row": row,
        "picture": whole and "data:image/jpeg;base64," + base64.b64encode(jpeg(whole)).decode(),
        "frames": len(readable),
        "shown": telling(readable),
        "aspect": round(readable[0].width / readable[0].height, 4) if readable else 1,
        "shard": corpus.shards[sample.shard].name,
        "command": fetch_command(corpus.tar_url(sample.shard), row["offsets"][0], row["sizes"][0], target),
    }


def telling(frames: Sequence[Image.Image]) -> int:
    """The frame of a clip that is shown alone: the one nearest to the middle that is not of one colour."""
    nearest = sorted(range(len(frames)), key=lambda number: abs(number - len(frames) // 2))
    return next((number for number in nearest if np.asarray(frames[number]).std() > PLAIN), len(frames) // 2)


def equal_frames(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Frames of a clip, all in the shape of the first, with FRAME_HEIGHT or less."""
    height = min(FRAME_HEIGHT, images[0].height)
    width = max(1, round(images[0].width * height / images[0].height))
    return [image.resize((width, height), Image.Resampling.LANCZOS) for image in images]
