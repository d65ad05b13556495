"""Settings of evaluation, as they stand in a run's YAML."""

from __future__ import annotations

from dataclasses import dataclass

from eval.report.published import benchmarks
from loaders.config import PerMedia
from model.config import ENSEMBLES
from runtime.errors import UserError
from runtime.settings import check_declared, evaluation, fixed, free, nearest

TASKS = ("retrieval", "qa", "choice")
ACCURACIES = ("exact", "vqa")


@dataclass
class EvalConfig:
    """What is evaluated, how scores are computed, and what the report shows."""

    task: str = fixed("retrieval", "what is fine-tuned for and evaluated", choices=TASKS)
    k_test: int = evaluation(
        128, "re-ranked candidates of a query or question; retrieval: 0 for the dual encoder only", least=0
    )
    eval_frame_ensemble: str = evaluation(
        "concat", "of several frames: concat is early fusion, the others combine the frames' scores", choices=ENSEMBLES
    )
    eval_x_only: bool = evaluation(False, "the cross-encoder scores every pair")
    eval_offload: bool = free(False, "keep visual tokens in host memory instead of the device's")
    feature_cache: str | None = free(None, "folder in which encoded visuals are kept for later evaluations")
    batch_size_test: PerMedia = free(lambda: PerMedia(64, 16), "visuals encoded at once, for each rank")
    pair_batch_size: int = free(256, "(text, visual) pairs of a rank that the cross-encoder scores at once", least=1)
    ensemble_skips_temporal: bool = evaluation(
        False, "as the official code: frames scored one by one do without the temporal modules"
    )
    eval_num_frames: list[int] = evaluation(list, "several evaluations, each with this many frames of a clip")
    answer_list: str | None = evaluation(None, "qa: path or URL of a JSON list of the candidate answers")
    accuracy: str = evaluation("exact", "qa: exact match, or soft accuracy as the official tool", choices=ACCURACIES)
    benchmark: str | None = free(None, "whose published numbers the report shows: a name of eval/published.json")
    save_scores: bool = free(False, "write scores.npz after each epoch too, not only at the end")
    gallery: int = free(8, "best, worst and random queries shown in the report, each")
    gallery_frames: int = free(4, "frames shown of a clip in the report")

    def __post_init__(self) -> None:
        """Check the values; raises ValueError naming the key."""
        check_declared(self)
        if self.benchmark is not None and self.benchmark not in benchmarks():
            near = nearest(self.benchmark, benchmarks()) or benchmarks()
            raise UserError(
                f"benchmark is {self.benchmark!r}, of which nothing is published: {', '.join(near)}, or null"
            )
        if any(frames < 1 for frames in self.eval_num_frames):
            raise UserError(f"eval_num_frames is {self.eval_num_frames}: each must be at least 1")
