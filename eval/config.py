"""Settings of evaluation in a run's YAML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report.published import benchmarks
from loaders.config import LoaderConfig, PerMedia
from model.config import ENSEMBLES
from runtime.errors import UserError
from runtime.settings import check_declared, evaluation, fixed, free, nearest

ACCURACIES = ("exact", "vqa")
RERANK_SCORES = ("itm", "itm+itc")


@dataclass
class EvalConfig:
    """Settings of the scores and of the report."""

    task: str = fixed("retrieval", "task of fine-tuning and evaluation: retrieval, qa, choice, or yours")
    task_options: dict[str, Any] = evaluation(dict, "settings of a task of your own", replaced=True)
    k_test: int = evaluation(
        128, "candidates to re-rank for a query or question; retrieval: 0 for the dual encoder only", least=0
    )
    rerank_score: str = evaluation(
        "itm",
        "what orders the re-ranked: itm, the match logit; itm+itc, with similarity; unset: as in its training",
        choices=RERANK_SCORES,
    )
    eval_frame_ensemble: str = evaluation(
        "concat", "concat: early fusion of the frames; others: late fusion of the frames' scores", choices=ENSEMBLES
    )
    eval_x_only: bool = evaluation(False, "score every pair with the cross-encoder")
    eval_offload: bool = free(False, "keep visual tokens in host memory instead of the device's")
    feature_cache: str | None = free(None, "cache folder of encoded visuals, for later evaluations")
    batch_size_test: PerMedia = free(lambda: PerMedia(64, 16), "visuals encoded at once, per rank")
    pair_batch_size: int = free(256, "(text, visual) pairs that the cross-encoder scores at once, per rank", least=1)
    ensemble_skips_temporal: bool = evaluation(
        False, "score single frames without the temporal modules, as the official code does"
    )
    eval_num_frames: list[int] = evaluation(list, "frames per clip; several values: one evaluation each")
    answer_list: str | None = evaluation(None, "qa: path or URL of a JSON list of the candidate answers")
    accuracy: str = evaluation("exact", "qa: exact match, or the soft accuracy of VQA", choices=ACCURACIES)
    benchmark: str | None = free(None, "published numbers that the report shows: a name of eval/report/published.json")
    save_scores: bool = free(False, "write scores.npz after each epoch too, not only at the end")
    gallery: int = free(8, "best, worst and random queries shown in the report, each")
    gallery_frames: int = free(4, "frames per clip shown in the report")

    def __post_init__(self) -> None:
        """Check the values; raises ValueError with the key."""
        check_declared(self)
        if self.benchmark is not None and self.benchmark not in benchmarks():
            near = nearest(self.benchmark, benchmarks()) or benchmarks()
            raise UserError(
                f"benchmark is {self.benchmark!r}, which has no published numbers: set {', '.join(near)}, or null"
            )
        if any(frames < 1 for frames in self.eval_num_frames):
            raise UserError(f"eval_num_frames is {self.eval_num_frames}: each must be at least 1")


def name_splits(urls: str | list[Any]) -> dict[str, Any]:
    """Test corpora by the last part of their URL, `{"photos_test": "data/photos_test"}`; of tars what comes before { }.

    Raises UserError where that is not a name, or names two of them.
    """
    result: dict[str, Any] = {}
    for url in [urls] if isinstance(urls, str) else urls:
        name = str(url).rstrip("/").rpartition("/")[2].removesuffix(".tar").partition("{")[0].rstrip("-_.")
        if not name or "$" in name or name in result:
            why = "names two splits" if name in result else "does not name the split"
            raise UserError(f"test_corpus: {name or url} {why}: name each, 'test_corpus={{NAME: URL, OTHER: URL}}'")
        result[name] = url
    return result


@dataclass
class EvalRunConfig(LoaderConfig, EvalConfig):
    """The settings of a run that an evaluation uses: loader, evaluation and test corpora."""

    # Corpora are packed ones, by URL or by their name in available_corpus.
    available_corpus: dict[str, Any] = free(dict, "name: URL of a packed corpus, or a list of names and URLs")
    test_corpus: dict[str, str] = evaluation(
        dict, "name of a split: packed corpus; or URLs alone, named by their last part", replaced=True,
        convert=name_splits,
    )  # fmt: skip
    splits: list[str] = evaluation(list, "splits of test_corpus to evaluate; empty: all")
    label: str | None = free(None, "name of the evaluation's folder; default: from frames and ensemble")

    def __post_init__(self) -> None:
        """Check the values; raises ValueError with the key, the value and the rule."""
        super().__post_init__()
        for name in self.test_corpus:  # folders and files are named by it, and entries of metrics.json
            if not name or name.startswith(".") or Path(name).name != name:
                raise UserError(f"test_corpus has a split {name!r}: must be a name that a file can have, without /")
            if f"{name}_emb" in self.test_corpus:
                raise UserError(
                    f"test_corpus has splits {name!r} and '{name}_emb', which is what the results of {name!r} by the "
                    "dual encoder are called: give one of them another name"
                )
        unknown = [name for name in self.splits if name not in self.test_corpus]
        if unknown:
            raise UserError(
                f"splits names {unknown[0]!r}, test_corpus has {', '.join(self.test_corpus) or 'none'}: name some of "
                "these, or splits=[] for all"
            )
        if self.label is not None and (self.label in ("", "..") or Path(self.label).name != self.label):
            raise UserError(f"label is {self.label!r}, must be the name of a folder within OUTPUT_DIR/evaluation")

    def test_urls(self) -> dict[str, str]:
        """Name -> URL of the splits that are to be evaluated."""
        result = {}
        for name in self.splits or self.test_corpus:
            urls = resolve_corpora(self.test_corpus[name], self.available_corpus, f"test_corpus.{name}")
            if len(urls) != 1:
                raise UserError(f"test_corpus.{name} names {len(urls)} corpora: must be one")
            result[name] = urls[0]
        return result


def resolve_corpora(what: Any, available: dict[str, Any], key: str) -> list[str]:
    """URLs of the corpora that `what` means: a name in `available`, a URL, a folder, or a list of them.

    available: name -> the same forms, so that names can stand for several corpora. Raises ValueError, with the name
    that `key` holds, when it is neither in `available` nor a URL or a folder.
    """
    if isinstance(what, list):
        return [url for item in what for url in resolve_corpora(item, available, key)]
    if not isinstance(what, str):
        raise UserError(f"{key} is {what!r}: must be a corpus' name or URL, or a list of them")
    if what in available:
        others = {name: value for name, value in available.items() if name != what}
        return resolve_corpora(available[what], others, f"available_corpus.{what}")
    if "/" in what or what.endswith(".tar") or Path(what).exists():
        return [what]
    near = nearest(what, available) or sorted(available)
    raise UserError(
        f"{key} names {what!r}, which is neither in available_corpus (nearest: {', '.join(near) or 'it is empty'}) "
        "nor a URL nor a folder"
    )
