"""The rows of the paper's tables, and what each needs: configs/reproduce/benchmarks.yaml with the published numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval.report.published import Published, all_published
from runtime.errors import UserError
from runtime.packaged import find_file
from runtime.settings import listed_nearest, nearest, read_yaml

FILE = "configs/reproduce/benchmarks.yaml"
PRE_TRAINED = "pt"  # archive of the pre-trained checkpoints
TEMPORAL = ("video_input.num_frames=4", "add_temporal_embed=true", "temporal_vision_encoder.enable=true")


@dataclass
class Annotations:
    """Annotation files, below the folder of downloads, that together are one set; `keep` is a flag of packing."""

    files: list[str] = field(default_factory=list)
    keep: str = ""


@dataclass
class CorpusRecipe:
    """How a corpus is packed: the YAML of configs/corpora, sets of annotations, folders of media."""

    recipe: str = ""
    annotations: list[Annotations] = field(default_factory=list)
    media: list[str] = field(default_factory=list)
    media_root: str = ""
    samples: int = 0  # of the published test set; 0: not known, or not a test set


@dataclass
class Training:
    """How a benchmark's model is fine-tuned, where that is not by the recipe as it stands."""

    recipe: str = ""
    corpus: str = ""


@dataclass
class Benchmark:
    """A benchmark: its recipe, the archive of its checkpoints, the list of answers that the paper ranks."""

    recipe: str = ""
    checkpoints: str = ""
    answer_list: str = ""
    training: Training = field(default_factory=Training)


@dataclass
class Inputs:
    """The whole file."""

    sources: dict[str, str] = field(default_factory=dict)
    corpora: dict[str, CorpusRecipe] = field(default_factory=dict)
    benchmarks: dict[str, Benchmark] = field(default_factory=dict)

    def corpus(self, url: str) -> CorpusRecipe:
        """How the corpus at a URL, known by its last part, is packed; raises UserError where that is not known."""
        name = url.rstrip("/").rpartition("/")[2]
        if name not in self.corpora:
            raise UserError(
                f"{url} is not a corpus of {FILE}: leave out the setting that names it, data_root=... moves all"
            )
        return self.corpora[name]

    def source_of(self, path: str) -> str:
        """Where a file or folder below the downloads comes from: the source of the longest path that it lies in."""
        names = [name for name in self.sources if f"{path}/".startswith(f"{name}/")]
        name = max(names, key=len)
        return self.sources[name].format(name=name)


@dataclass(frozen=True)
class Row:
    """A model of the paper on a benchmark. published: split -> metrics in percent by their official names."""

    benchmark: str
    pretraining: str
    temporal: bool
    zero_shot: bool
    num_frames: int
    published: dict[str, dict[str, float]]

    @property
    def name(self) -> str:
        """The name on the command line, such as msrvtt_temporal_17m."""
        words = [
            self.benchmark,
            *["temporal"] * self.temporal,
            self.pretraining.lower(),
            *["zero_shot"] * self.zero_shot,
        ]
        return "_".join(words)

    @property
    def checkpoint_name(self) -> str:
        """How the name of the released checkpoint ends."""
        return f"singularity_{'temporal_' * self.temporal}{self.pretraining.lower()}.pth"


@cache
def inputs() -> Inputs:
    """What is in FILE; one in the current folder comes first."""
    path = find_file(FILE)
    assert path is not None
    try:
        return cast(Inputs, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Inputs), read_yaml(path))))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None


@cache
def rows() -> dict[str, Row]:
    """The rows of the paper's tables by name, in their order."""
    found: dict[str, Row] = {}
    for published in all_published():
        row = _row(published)
        found.setdefault(row.name, row).published.update(row.published)
    return found


def _row(published: Published) -> Row:
    metrics = {name: value for name, value in published.metrics.items() if not name.endswith("r_mean")}
    setting = (published.pretraining, published.temporal, published.zero_shot, published.num_frames)
    return Row(published.benchmark, *setting, {published.split: metrics})


def find_row(name: str) -> Row:
    """The row of this name; raises UserError with the nearest names."""
    if name not in rows():
        near: Sequence[str] = nearest(name, rows()) or list(rows())
        raise UserError(f"there is no row {name!r}: {listed_nearest(near)}")
    return rows()[name]
