"""`python -m train.plot RUN ...`: the curves of one or several runs, as a picture or a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report.grouping import ambiguous_splits
from eval.report.losses import MEDIA, loss_weights, read_metrics, weighted_name
from runtime.charts import Curve, Panel, panels_figure, png, svg
from runtime.errors import MissingError, UserError, command
from runtime.program import as_started, command_line
from sharding.shards.outside import check_outside_corpora

FIRST = ("loss", "loss_itc", "loss_itm", "loss_mlm", "loss_qa")
NEXT = ("grad_norm", "temperature", "lr")
LAST = ("samples_per_second", "data_wait", "memory_gb", "mfu")
ONE_CURVE = ("lr", "temperature", "memory_gb")  # for both media
SUMMARIES = ("/r_mean", "/overall")  # the metrics of evaluations that are drawn by default
NOT_DRAWN = ("step", "epoch", "media_type", "skipped")
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;
padding:0 1rem}svg{width:100%;height:auto}
:root{color-scheme:light dark}@media(prefers-color-scheme:dark){:root{--line:#2c2f36;--muted:#9a9ea9}}
td,th{padding:.2rem 1rem .2rem 0;text-align:left;font-variant-numeric:tabular-nums}</style>
<h1>{{ title }}</h1><table><tr><th>run<th>steps{% for name in columns %}<th>{{ name }}{% endfor %}</tr>
{% for run in runs %}<tr><td>{{ run.name }}<td>{{ run.steps }}{% for name in columns %}<td>{{ run.last(name) }}
{% endfor %}</tr>{% endfor %}</table>{{ curves|safe }}</html>
"""

Points = tuple[list[int], list[float]]  # steps and values


@dataclass
class Run:
    """What a run has logged, and the weights of its losses."""

    name: str
    lines: list[dict[str, Any]]
    weights: dict[str, float]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that can be drawn, in the order in which they were logged."""
        numbers = (name for line in self.lines for name, value in line.items() if isinstance(value, int | float))
        return [name for name in dict.fromkeys(numbers) if name not in NOT_DRAWN]

    @property
    def steps(self) -> int:
        """The last step that was logged."""
        return max(line["step"] for line in self.lines if "step" in line)

    def last(self, metric: str) -> str:
        """A metric's last value, in short; of each medium where they differ."""
        named = {f" {medium}" if medium else "": values[-1] for medium, (_, values) in self.curves_of(metric).items()}
        return ", ".join(f"{value:.4g}{medium}" for medium, value in named.items())

    def curves_of(self, metric: str) -> dict[str, Points]:
        """The curves of a metric: one per medium if there are two, else one without a name."""
        lines = [line for line in self.lines if isinstance(line.get(metric), int | float)]
        media = dict.fromkeys(line["media_type"] for line in lines if line.get("media_type") in MEDIA)
        curves = {MEDIA[medium]: [line for line in lines if line.get("media_type") == medium] for medium in media}
        if len(curves) < 2 or metric in ONE_CURVE:
            curves = {"": lines} if lines else {}
        return {
            name: ([int(line["step"]) for line in own], [float(line[metric]) for line in own])
            for name, own in curves.items()
        }


def read_run(folder: Path) -> Run:
    """The lines of a run's metrics.jsonl; one cut short is left out.

    Raises FileNotFoundError or ValueError when there is none or nothing in it.
    """
    path = folder / "metrics.jsonl" if folder.is_dir() else folder
    if not path.is_file():
        raise MissingError(f"{folder} has no metrics.jsonl: give the folder of a run")
    run = Run(path.parent.name, read_metrics(path), loss_weights(path.parent))
    if not run.metrics:
        raise UserError(f"{path} has no step yet: wait until the run has logged one (log_every)")
    return run


def metrics_of(runs: Sequence[Run]) -> list[str]:
    """All metrics of the runs: losses first, then evaluations, speed last."""
    found = list(dict.fromkeys(metric for run in runs for metric in run.metrics))
    losses = [metric for metric in found if metric.startswith("loss_")]
    first = dict.fromkeys([*FIRST, *losses, *NEXT])
    other = sorted(metric for metric in found if metric not in first and metric not in LAST)
    return [name for name in first if name in found] + other + [name for name in LAST if name in found]


def panel(metric: str, runs: Sequence[Run]) -> Panel:
    """A metric's panel: a colour a run and a line style a medium; evaluations are marked points."""
    curves = [
        Curve(
            f"{run.name}, {medium}" if medium else run.name,
            list(zip(*curve)),
            color=number,
            dashed=medium == MEDIA["video"],
            markers="/" in metric,
        )
        for number, run in enumerate(runs)
        for medium, curve in run.curves_of(metric).items()
    ]
    return Panel(curves, title(metric, runs))


def title(metric: str, runs: Sequence[Run]) -> str:
    """A panel's title: a loss with its weight, where the runs have the same one."""
    titles = {weighted_name(metric, run.weights) for run in runs if run.curves_of(metric)}
    return titles.pop() if len(titles) == 1 else f"{metric} (weighted)"


def _rename_ambiguous_splits(runs: Sequence[Run], folders: Sequence[Path]) -> None:
    """Name the curves of splits with the same name and other items by their run, so that each has its own panel."""
    for split in ambiguous_splits(folders):
        for run, folder in zip(runs, folders, strict=True):
            for name in (split, f"{split}_emb"):
                for line in run.lines:
                    for metric in [metric for metric in line if metric.startswith(f"{name}/")]:
                        line[f"{name} ({folder})/{metric.removeprefix(f'{name}/')}"] = line.pop(metric)


def write_plot(folders: Sequence[Path], output: Path, metrics: Sequence[str] = ()) -> list[str]:
    """Draw the runs' curves to OUTPUT.png or OUTPUT.html; returns the metrics drawn.

    Raises FileNotFoundError or ValueError for a run without curves, an unknown metric or another kind of output.
    """
    if output.suffix not in (".png", ".html"):
        raise UserError(f"{output}: a picture ends in .png, a page in .html")
    runs = [read_run(folder) for folder in folders]
    _rename_ambiguous_splits(runs, folders)
    known = metrics_of(runs)
    unknown = [metric for metric in metrics if metric not in known]
    if unknown:
        raise UserError(f"no run has logged {unknown[0]!r}: there are {', '.join(known)}")
    chosen = list(metrics) or [metric for metric in known if "/" not in metric or metric.endswith(SUMMARIES)]
    curves = panels_figure([panel(metric, runs) for metric in chosen])
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".png":
        output.write_bytes(png(curves))
        return chosen
    from jinja2 import Environment, select_autoescape

    page = Environment(autoescape=select_autoescape(default=True)).from_string(PAGE)
    title = ", ".join(run.name for run in runs)
    columns = [metric for metric in chosen if "/" in metric or metric == "loss"]
    text = page.render(title=title, runs=runs, columns=columns, curves=svg(curves, f"curves of {title}"))
    output.write_text(text, encoding="utf-8")
    return chosen


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog=command_line("train.plot"), description=as_started(__doc__))
    result.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs, also of running ones")
    result.add_argument("--output", type=Path, default=Path("plot.png"), help="a .png or .html (default: %(default)s)")
    which = "for example loss val/txt_r1 (default: all, but only the means of evaluations)"
    result.add_argument("--figures", dest="metrics", nargs="+", default=[], metavar="NAME", help=which)
    return result


@command()
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parser().parse_args(arguments)
    check_outside_corpora(options.output, "--output")
    drawn = write_plot(options.runs, options.output, options.metrics)
    sys.stdout.write(f"{options.output}: {', '.join(drawn)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
