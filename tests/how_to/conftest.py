"""The launches of tests/train, for the pages of docs/how-to."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "train"))
