"""What a row still needs, and the commands that get its numbers: pack, fine-tune, evaluate."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from launch.reproduce.rows import PRE_TRAINED, TEMPORAL, Annotations, Benchmark, CorpusRecipe, Row, inputs
from runtime.errors import MissingError, UserError
from train.config.settings import RunConfig, load_settings


@dataclass(frozen=True)
class Command:
    """A subcommand of `singularity` with its arguments. corpus: the URL that it packs, where it does."""

    words: list[str]
    corpus: str = ""

    @property
    def name(self) -> str:
        """The subcommand."""
        return self.words[0]

    def __str__(self) -> str:
        return shlex.join(["singularity", *self.words])


@dataclass(frozen=True)
class Reproduction:
    """A row on this machine. downloads: folder of what was fetched; output: of runs; settings: `key=value` for
    fine-tuning and evaluation; processes: 0 for as many as there are GPUs.
    """

    row: Row
    downloads: Path
    output: Path
    checkpoint: str | None = None
    train: bool = False
    settings: list[str] = field(default_factory=list)
    processes: int = 0

    @property
    def benchmark(self) -> Benchmark:
        """How the row's benchmark is run."""
        return inputs().benchmarks[self.row.benchmark]

    @property
    def run_folder(self) -> Path:
        """The folder of the results, and with `train` of the fine-tuned model."""
        return self.output / (f"{self.row.name}_trained" if self.train else self.row.name)

    @property
    def metrics_file(self) -> Path:
        """Where the evaluation writes its metrics."""
        return self.run_folder / "metrics.json"

    @cached_property
    def evaluation(self) -> RunConfig:
        """The configuration of the evaluation."""
        recipe, *settings = self._evaluate_words()
        return load_settings(recipe, settings).config

    @cached_property
    def training(self) -> RunConfig:
        """The configuration of fine-tuning."""
        recipe, *settings = self._train_words()
        return load_settings(recipe, settings).config

    def weights(self) -> str:
        """The checkpoint that the commands start from: as given, else the released one.

        Raises UserError where several files below the downloads may be the released one.
        """
        if self.checkpoint is not None:
            return self.checkpoint
        archive = PRE_TRAINED if self.row.zero_shot or self.train else self.benchmark.checkpoints
        folder, ending = self.downloads / archive, self.row.checkpoint_name
        found = sorted(folder.glob(f"*{ending}"))
        if len(found) > 1:
            raise UserError(f"{folder} has several files *{ending}: choose one with --checkpoint FILE")
        prefix = "" if archive == PRE_TRAINED else f"ft_{archive}_"
        return str(found[0] if found else folder / f"{prefix}{ending}")

    def corpora(self) -> dict[str, CorpusRecipe]:
        """URL -> how it is packed, of every corpus that the commands read."""
        urls = list(self.evaluation.test_urls().values())
        if self.train:
            urls += [*self.training.train_urls(), *self.training.test_urls().values()]
        return {url: inputs().corpus(url) for url in urls}

    def commands(self) -> list[Command]:
        """The commands in their order, those of packed corpora too."""
        found = [Command(self._pack_words(url, recipe), url) for url, recipe in self.corpora().items()]
        launcher = ["--num_accelerators", str(self.processes)] if self.processes else []
        if self.train:
            found.append(Command(["finetune", *launcher, *self._train_words()]))
        return [*found, Command(["evaluate", *launcher, *self._evaluate_words()])]

    def _pack_words(self, url: str, recipe: CorpusRecipe) -> list[str]:
        chosen = self.chosen_annotations(recipe)
        name = recipe.recipe or url.rstrip("/").rpartition("/")[2]
        words = ["pack", "--corpus", f"configs/corpora/{name}.yaml", "--annotations"]
        words += [str(self.downloads / name) for name in chosen.files]
        words += ["--keep", chosen.keep] if chosen.keep else []
        return [*words, "--media-root", str(self.downloads / (recipe.media_root or recipe.media[0])), "--output", url]

    def _train_words(self) -> list[str]:
        training, recipe = self.benchmark.training, self.benchmark.training.recipe or self.benchmark.recipe
        words = [recipe, f"pretrained_path={self.weights()}", f"output_dir={self.run_folder}", *self._common()]
        if training.corpus:
            words.append(f"train_corpus={self.evaluation.data_root}/{training.corpus}")
        return [*words, *(TEMPORAL if self.row.temporal else ()), *self.settings]

    def _evaluate_words(self) -> list[str]:
        checkpoint = str(self.run_folder) if self.train else self.weights()
        words = [self.benchmark.recipe, f"checkpoint={checkpoint}", f"output_dir={self.run_folder}", *self._common()]
        words += [f"splits=[{','.join(self.row.published)}]", f"video_input.num_frames_test={self.row.num_frames}"]
        return [*words, *self.settings]

    def _common(self) -> list[str]:
        """Settings of fine-tuning and of evaluation. Official checkpoints have no vocabulary."""
        answers = self.benchmark.answer_list
        return ["tokenizer=bert-base-uncased", *([f"answer_list={self.downloads / answers}"] if answers else [])]

    def chosen_annotations(self, recipe: CorpusRecipe) -> Annotations:
        """The first set of annotations that is there; if there is none, the first."""
        there = (each for each in recipe.annotations if all((self.downloads / name).is_file() for name in each.files))
        return next(there, recipe.annotations[0])

    def missing(self) -> dict[str, str]:
        """Path -> where it comes from, of everything that has to be fetched first."""
        found = {}
        if not Path(self.weights()).exists():
            archive = Path(self.weights()).parent.name
            found[self.weights()] = (
                inputs().source_of(archive) if self.checkpoint is None else "as given by --checkpoint"
            )
        needed = dict.fromkeys(self._needed())
        return found | {str(self.downloads / name): inputs().source_of(name) for name in needed if self._lacks(name)}

    def _needed(self) -> Iterator[str]:
        """Files and folders below the downloads, those of packed corpora left out."""
        yield from [self.benchmark.answer_list] if self.benchmark.answer_list else []
        for url, recipe in self.corpora().items():
            if num_samples(url) is None:
                yield from self.chosen_annotations(recipe).files
                yield from recipe.media

    def _lacks(self, name: str) -> bool:
        path = self.downloads / name
        return not path.is_file() and not (path.is_dir() and any(path.iterdir()))


def num_samples(url: str) -> int | None:
    """Number of images or videos of a packed corpus; None where none is packed."""
    from sharding.shards.schema import read_corpus

    try:
        return read_corpus(url).samples
    except MissingError:
        return None
