"""Fine-tuning for retrieval from a pre-trained checkpoint (pretrained_path=...), then evaluation of all splits."""

import sys
from pathlib import Path

if not __package__:  # started by its path, not by `python -m`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.command import Ranks, Settings, run


def main(settings: Settings, ranks: Ranks) -> None:
    """Import PyTorch only now: errors in the settings show at once."""
    from launch.training import finetune

    finetune(settings, ranks, answers=False)


if __name__ == "__main__":
    run(__file__, __doc__, main)
