"""The settings of a build: each is declared once, with its flag of `python -m sharding.build`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from runtime.errors import UserError
from runtime.flags import changed, flag, part
from runtime.progress import LOG_EVERY
from sharding.annotations.config import CorpusConfig, Reading, load_corpus, parse_pairs, with_columns
from sharding.executors.executor import Executor
from sharding.shards.plan import ShardSettings
from storage.fetching import Fetching


@dataclass(frozen=True)
class BuildSettings:
    """Settings of packing. Only `shards`, `reading` and the inputs decide the bytes."""

    annotations: Sequence[str] = flag(
        (),
        'files or patterns; by default JSON lists of {"image" or "video": path, "caption": ...}',
        nargs="+",
        metavar="FILE",
        group="annotations",
    )
    reading: Reading = part(Reading, "annotations")
    media_root: str = flag(
        "",
        "folder, archive (.tar, .zip) or URL that the media paths start from; not needed where they are URLs",
        metavar="URL",
    )
    output: str = flag(
        "", "folder of the packed corpus; run again to continue after an interruption", metavar="URL", required=True
    )
    shards: ShardSettings = part(ShardSettings)
    executor: Executor = part(Executor)
    fetching: Fetching = part(Fetching, "media from URLs")
    max_failures: float = flag(
        0.05,
        "exit with 1, without corpus.json, if a larger share of the media failed (default: %(default)s)",
        metavar="SHARE",
    )
    retry_failed: bool = flag(False, "rebuild the shards with failed media, after fixing the media")
    log_every: float = flag(
        LOG_EVERY,
        f"where the output is not a terminal, seconds between JSON log lines (default: {LOG_EVERY:g}; 0: never)",
        metavar="SECONDS",
    )
    progress: bool = False  # show how far the build has come

    def prepared(self) -> BuildSettings:
        """The settings with a name, annotation files instead of patterns, and local paths without their scheme.

        Raises FileNotFoundError: an annotation file or the media root is missing. ValueError: a setting cannot work.
        """
        from sharding.annotations.reading import expanded
        from sharding.media.sources import check_root
        from sharding.shards.schema import check_columns
        from storage.urls import local_form

        values = {"name": self.shards.name or usual_name(self.output)}
        values |= {"output": local_form(self.output), "media_root": local_form(self.media_root)}
        settings = changed(self, values)
        settings.shards.check()
        check_columns(settings.reading.extra_columns, packed=True)
        if not 0 <= self.max_failures <= 1:
            raise UserError(f"--max-failures is {self.max_failures:g}, must be a share from 0 to 1, such as 0.05")
        self.fetching.check()
        self.executor.check()
        check_root(settings.media_root)
        return changed(settings, {"annotations": expanded(self.annotations)})


def usual_name(output: str) -> str:
    """The name of a corpus that is not given one: that of its folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", output.rstrip("/").rsplit("/", 1)[-1])[:60] or "corpus"


def read_settings(flags: Mapping[str, Any], corpus: str = "") -> BuildSettings:
    """The merged settings: flags override the YAML `corpus`, which overrides the defaults.

    Raises FileNotFoundError: the YAML does not exist. ValueError: it is wrong, a flag is, or something that has no
    default is missing.
    """
    config = load_corpus(corpus) if corpus else CorpusConfig()
    found = {each.name: getattr(config, each.name) for each in fields(config)}
    given = {name: value for name, value in found.items() if value is not None} | dict(flags)
    if "columns" in flags:
        given["columns"] = with_columns(config.columns, parse_pairs("--columns", flags["columns"]))
    if "extra_columns" in flags:
        given["extra_columns"] = config.extra_columns | parse_pairs("--extra-columns", flags["extra_columns"])
    if "keep" in flags:
        pairs = parse_pairs("--keep", flags["keep"])
        given["keep"] = {**config.keep, **{column: values.split(",") for column, values in pairs.items()}}
    settings = changed(BuildSettings(), given)
    for name, value in (("annotations", settings.annotations), ("media-type", settings.shards.media_type)):
        if not value:
            raise UserError(f"--{name} is missing" + ("" if corpus else ": give it, or a --corpus that sets it"))
    if settings.reading.limit < 0:
        raise UserError(f"--limit is {settings.reading.limit}, must be 1 or more")
    return settings
