"""Fine-tuning for retrieval from a pre-trained checkpoint (pretrained_path=...), then evaluation of all splits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started by its path, not by `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if TYPE_CHECKING:
    from runtime.ranks import Ranks
    from train.config.files import Settings


def main(settings: Settings, ranks: Ranks) -> None:
    """The entry point's work."""
    from launch.finetuning import finetune

    finetune(settings, ranks, ("retrieval", "choice"))


if __name__ == "__main__":
    from launch.command import run

    run(__file__, __doc__, main)
