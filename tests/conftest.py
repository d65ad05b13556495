"""Fixtures that several rooms share: a small Shapes corpus, packed once per session by the real tools."""

import signal
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from needs import LEFT_OUT

from loaders.vocab import learn_vocabulary
from preprocessing.text import Tokenizer
from sharding.build import build_corpus
from sharding.shapes import write_shapes

pytest_plugins = ["object_stores", "browser", "hosts", "slurm_cluster"]

# Child processes must react to SIGINT; in a background job of a shell they would inherit that it is ignored.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("any machine", deadline=None)  # the time of an example depends on the machine
settings.load_profile("any machine")

LONGEST = {"launch", "train"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest folders first: at the end, one slow file would keep the other processes waiting."""
    items.sort(key=lambda item: not LONGEST & set(item.path.parts))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List every skipped test below its reason; pytest's own summary gives a file and a line."""
    left_out: dict[str, list[str]] = defaultdict(list)
    for report in terminalreporter.stats.get("skipped", []):
        left_out[report.longrepr[2].removeprefix("Skipped: ").removeprefix(LEFT_OUT)].append(report.nodeid)
    for reason, tests in sorted(left_out.items()):
        terminalreporter.section(f"{len(tests)} left out: {reason}", sep="-")
        terminalreporter.write_line("\n".join(sorted(tests)))


@dataclass(frozen=True)
class ShapesCorpus:
    """Folders of a drawn and packed corpus: `folder` as drawn, `shards` a packed corpus for each annotation file."""

    folder: Path
    shards: Path
    vocab: Path

    def url(self, name: str) -> str:
        """URL of a packed corpus, such as images_train."""
        return str(self.shards / name)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShapesCorpus:
    root = tmp_path_factory.mktemp("shapes")
    folder = write_shapes(root / "drawn", images=150, clips=40, test_items=24, size=48, seed=3)
    kinds = {"images_train": "image", "images_test": "image", "clips_train": "video", "clips_test_motion": "video"}
    kinds |= {"clips_test_appearance": "video", "qa_train": "video", "qa_test": "video", "mc_test": "video"}
    for name, kind in kinds.items():
        build_corpus(
            [str(folder / f"{name}.json")], str(folder / "media"), kind, str(root / name), size=48, fps=4, workers=1
        )
    vocab = root / "vocab.txt"
    learn_vocabulary([str(root / "images_train"), str(root / "clips_train"), str(root / "qa_train")], 600, vocab)
    return ShapesCorpus(folder, root, vocab)


@pytest.fixture(scope="session")
def tokenizer(shapes: ShapesCorpus) -> Tokenizer:
    return Tokenizer.load(str(shapes.vocab))
