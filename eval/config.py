"""Settings of evaluation, as they stand in a run's YAML."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from eval.report.published import benchmarks
from loaders.config import PerMedia
from model.config import ENSEMBLES
from runtime.errors import UserError
from runtime.settings import evaluation, fixed, free

TASKS = ("retrieval", "qa", "choice")
ACCURACIES = ("exact", "vqa")


@dataclass
class EvalConfig:
    """What is evaluated, how scores are computed, and what the report shows."""

    task: str = fixed("retrieval")  # what is fine-tuned for and evaluated: retrieval | qa | choice
    k_test: int = evaluation(128)  # candidates re-ranked of each query or question; retrieval: 0 for dual encoder only
    eval_frame_ensemble: str = evaluation("concat")  # concat (early fusion) | mean | max | lse (of per-frame scores)
    eval_x_only: bool = evaluation(False)  # the cross-encoder scores every pair
    eval_offload: bool = free(False)  # keep visual tokens in host memory, not on the device
    feature_cache: str | None = free(None)  # folder that keeps encoded visuals, on disk, for later evaluations
    batch_size_test: PerMedia = free(factory=lambda: PerMedia(64, 16))  # visuals encoded at once, a rank
    pair_batch_size: int = free(256)  # (text, visual) pairs the cross-encoder scores at once, a rank
    ensemble_skips_temporal: bool = evaluation(False)  # official: per-frame scores pass by the temporal modules
    eval_num_frames: list[int] = evaluation(factory=list)  # several evaluations, each with so many test frames
    answer_list: str | None = evaluation(None)  # qa: path or URL of a JSON list of the answers that may be given
    accuracy: str = evaluation("exact")  # qa: exact (match) | vqa (soft accuracy of the official tool)
    benchmark: str | None = free(None)  # whose published numbers the report shows, by its name in eval/published.json
    save_scores: bool = free(False)  # scores.npz after each epoch too; at the end of a run it is written anyway
    gallery: int = free(8)  # best, worst and random queries shown in the report, each
    gallery_frames: int = free(4)  # frames of a clip's strip in the report

    def __post_init__(self) -> None:
        """Check the values; raises ValueError naming the key."""
        for name, choices in (("task", TASKS), ("eval_frame_ensemble", ENSEMBLES), ("accuracy", ACCURACIES)):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}, must be one of {', '.join(choices)}")
        if self.benchmark is not None and self.benchmark not in benchmarks():
            near = get_close_matches(self.benchmark, benchmarks()) or benchmarks()
            raise UserError(
                f"benchmark is {self.benchmark!r}, of which nothing is published: {', '.join(near)}, or null"
            )
        if any(frames < 1 for frames in self.eval_num_frames):
            raise UserError(f"eval_num_frames is {self.eval_num_frames}: each must be at least 1")
        if self.k_test < 0:
            raise UserError(f"k_test is {self.k_test}, must be 0 (dual encoder only) or more")
        if self.pair_batch_size < 1:
            raise UserError(f"pair_batch_size is {self.pair_batch_size}, must be at least 1")
