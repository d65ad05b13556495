"""`python -m launch.reproduce.page`: writes the tables of docs/reproduce.md, from the data that the command reads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from launch.reproduce.rows import PRE_TRAINED, Row, inputs, rows
from runtime.errors import PROGRAM
from train.config.settings import load_settings

PAGE = PROGRAM / "docs/reproduce.md"
BEGIN, END = "<!-- tables: begin (python -m launch.reproduce.page) -->", "<!-- tables: end -->"


def with_tables(text: str) -> str:
    """The page with the tables between BEGIN and END made anew."""
    before, _, rest = text.partition(BEGIN)
    tables = [*_rows(), "", *_test_sets(), "", *_downloads()]
    return "\n".join([before + BEGIN, "", *tables, "", END]) + rest.partition(END)[2]


def _rows() -> Iterator[str]:
    yield "## Rows\n\n| row | published | test frames | checkpoint |\n|---|---|---|---|"
    for benchmark, members in groupby(rows().values(), lambda row: row.benchmark):
        yield f"| **{benchmark}** | | | |"
        for row in members:
            archive = PRE_TRAINED if row.zero_shot else inputs().benchmarks[benchmark].checkpoints
            checkpoint = f"`{archive}/*{row.checkpoint_name}`"
            yield f"| `{row.name}` | {_published(row)} | {row.num_frames} | {checkpoint} |"


def _published(row: Row) -> str:
    """The published numbers of a row: recalls at 1, 5 and 10, or the accuracy of each split."""
    found = []
    for split, metrics in row.published.items():
        if "overall" in metrics:
            found.append(f"{split} {metrics['overall']:g}" if len(row.published) > 1 else f"{metrics['overall']:g}")
            continue
        for side in ("txt", "img"):
            recalls = [f"{value:.1f}" for name, value in metrics.items() if name.startswith(side)]
            found += [f"{side}_r {' / '.join(recalls)}"] if recalls else []
    return "; ".join(found)


def _test_sets() -> Iterator[str]:
    yield "## Test sets\n"
    yield "| benchmark | recipe | corpus | annotations | media | images or videos |\n|---|---|---|---|---|---|"
    for name, benchmark in inputs().benchmarks.items():
        splits = {split for row in rows().values() if row.benchmark == name for split in row.published}
        for split, url in load_settings(benchmark.recipe).config.test_urls().items():
            if split in splits:
                corpus = url.rpartition("/")[2]
                recipe = inputs().corpora[corpus]
                files = " or ".join(" + ".join(f"`{file}`" for file in each.files) for each in recipe.annotations)
                media = ", ".join(f"`{folder}`" for folder in recipe.media)
                size = f"{recipe.samples:,}" if recipe.samples else ""
                yield f"| {name}, {split} | `{benchmark.recipe}` | `{corpus}` | {files} | {media} | {size} |"


def _downloads() -> Iterator[str]:
    yield "## Downloads\n\n| below `downloads/` | from |\n|---|---|"
    for name, source in inputs().sources.items():
        yield f"| `{name}` | {source.format(name=name)} |"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
