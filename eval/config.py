"""Settings of evaluation, as they stand in a run's YAML."""

from __future__ import annotations

from dataclasses import dataclass, field

from loaders.config import PerMedia

FRAME_ENSEMBLES = ("concat", "mean", "max", "lse")


@dataclass
class EvalConfig:
    """How scores are computed. Nothing here but `k_test`, `eval_frame_ensemble` and `eval_x_only` changes a result."""

    k_test: int = 128  # candidates of each query that the cross-encoder re-ranks; 0: dual encoder only
    eval_frame_ensemble: str = "concat"  # concat (early fusion) | mean | max | lse (of per-frame scores)
    eval_x_only: bool = False  # the cross-encoder scores every pair
    eval_offload: bool = False  # keep visual tokens in host memory, not on the device
    batch_size_test: PerMedia = field(default_factory=lambda: PerMedia(64, 16))  # visuals encoded at once, a rank
    pair_batch_size: int = 256  # (text, visual) pairs the cross-encoder scores at once, a rank
    ensemble_skips_temporal: bool = False  # official behaviour: per-frame scores pass by the temporal modules
    gallery: int = 8  # best, worst and random queries shown in the report, each
    gallery_frames: int = 4  # frames of a clip's strip in the report

    def __post_init__(self) -> None:
        """Check the values; raises ValueError naming the key."""
        if self.eval_frame_ensemble not in FRAME_ENSEMBLES:
            raise ValueError(
                f"eval_frame_ensemble is {self.eval_frame_ensemble!r}, must be one of {', '.join(FRAME_ENSEMBLES)}"
            )
        if self.k_test < 0:
            raise ValueError(f"k_test is {self.k_test}, must be 0 (dual encoder only) or more")
        if self.pair_batch_size < 1:
            raise ValueError(f"pair_batch_size is {self.pair_batch_size}, must be at least 1")
