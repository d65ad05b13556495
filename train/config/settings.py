"""Every setting of a run, checked: what a YAML may hold, and the values it has when it says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from eval.config import EvalConfig
from loaders.config import LoaderConfig
from model.config import ModelSettings
from runtime.errors import UserError
from runtime.settings import evaluation, fixed, free, nearest, setting
from train.config.other_names import EXPLAINED

PRECISIONS = ("bf16", "fp16", "fp32")
WANDB_MODES = ("online", "offline", "disabled")


@dataclass
class DifferentLearningRate:
    """Modules with a learning rate of their own."""

    enable: bool = setting(False, "give some modules a learning rate of their own")
    module_names: list[str] = setting(list, "those modules, such as [temporal_vision_encoder]")
    lr: float = setting(1e-3, "their learning rate")


@dataclass
class OptimizerConfig:
    """AdamW. No weight decay on biases and on parameters of one dimension."""

    lr: float = setting(1e-4, "learning rate after the warm-up", least=0)
    opt_betas: list[float] = setting(lambda: [0.9, 0.999], "AdamW's betas")
    weight_decay: float = setting(0.02, "weight decay; none for biases and parameters of one dimension")
    max_grad_norm: float = setting(-1.0, "gradients are clipped to this norm; 0 or less: no clipping")
    different_lr: DifferentLearningRate = setting(DifferentLearningRate)


@dataclass
class SchedulerConfig:
    """Linear warm-up, then cosine decay to `min_lr_multi` times the learning rate."""

    epochs: int = setting(10, "traversals of the corpora", least=1)
    warmup_epochs: float = setting(1.0, "linear warm-up; then cosine decay", least=0)
    min_lr_multi: float = setting(0.01, "the schedule's lowest learning rate over optimizer.lr, 0 to 1")


@dataclass
class WandbConfig:
    """Weights & Biases; metrics.jsonl is written in any case."""

    enable: bool = setting(False, "log to Weights & Biases")
    project: str = setting("singularity", "project of Weights & Biases")
    entity: str | None = setting(None, "user or team of Weights & Biases")
    mode: str = setting("online", "mode of Weights & Biases; offline needs no network", choices=WANDB_MODES)


def name_splits(urls: str | list[Any]) -> dict[str, Any]:
    """Test corpora by the last part of their URL, `{"photos_test": "data/photos_test"}`; of tars what comes before { }.

    Raises UserError where that is no name, or the name of two.
    """
    result: dict[str, Any] = {}
    for url in [urls] if isinstance(urls, str) else urls:
        name = str(url).rstrip("/").rpartition("/")[2].removesuffix(".tar").partition("{")[0].rstrip("-_.")
        if not name or "$" in name or name in result:
            why = "is the name of two" if name in result else "gives no name to the split"
            raise UserError(f"test_corpus: {name or url} {why}: name each, 'test_corpus={{NAME: URL, OTHER: URL}}'")
        result[name] = url
    return result


@dataclass
class RunConfig(ModelSettings, LoaderConfig, EvalConfig):
    """A run: the settings of the model, the loader, the evaluation and the optimiser, and where files are.

    Fine-tuning and evaluation take the model's settings from the checkpoint; see train.config.architecture.
    """

    explained: ClassVar[Mapping[str, str]] = EXPLAINED

    tokenizer: str = free("bert-base-uncased", "vocabulary: a vocab.txt, a folder that holds one, or a hub name")

    # Corpora are packed ones, by URL or by their name in available_corpus.
    data_root: str = free("data", "folder that other settings refer to as ${data_root}")
    available_corpus: dict[str, Any] = free(dict, "name: URL of a packed corpus, or a list of names and URLs")
    train_corpus: Any = fixed(None, "packed corpora to train on: a name, a URL, or a list of them")
    test_corpus: dict[str, str] = evaluation(
        dict, "name of a split: packed corpus; or URLs alone, named by their last part", replaced=True,
        convert=name_splits,
    )  # fmt: skip
    splits: list[str] = evaluation(list, "splits of test_corpus to evaluate; empty: all")

    optimizer: OptimizerConfig = fixed(OptimizerConfig)
    scheduler: SchedulerConfig = fixed(SchedulerConfig)
    accumulate: int = free(1, "micro-batches that a rank's part of a batch is split into", least=1)
    gradient_checkpointing: bool = free(False, "recompute activations in the backward pass: slower, less memory")
    compile: bool = free(False, "torch.compile for the step: minutes at the start, faster steps; not with ZeRO 3")
    precision: str = fixed("bf16", "data type of the weights in a step", choices=PRECISIONS)
    deepspeed: str = free("deepspeed_configs/zero1.json", "DeepSpeed's JSON: a packaged one, or a path of your own")

    output_dir: str | None = free(None, "folder of the run")
    resume: bool = free(True, "continue the run in output_dir from its newest checkpoint")
    pretrained_path: str | None = fixed(
        None, "weights to start from: a run folder, a weights folder or an official .pth"
    )
    checkpoint: str | None = free(None, "weights to evaluate; the same forms")
    expected_tensors: list[str] = fixed(list, "tensors of those weights that need not fit, such as itm_head.*")
    label: str | None = free(None, "name of the evaluation's folder; default: from frames and ensemble")
    stop_key: str | None = fixed(None, "split whose metric chooses the best checkpoint; null: the last one is used")
    log_every: int = free(10, "steps between log lines", least=1)
    save_every: int = free(1000, "steps between checkpoints; also written at signals and at the end", least=1)
    save_minutes: float = free(0.0, "minutes between checkpoints, in addition; 0: never", least=0)
    keep_checkpoints: int = free(2, "checkpoints that are kept", least=1)
    checkpoint_url: str | None = free(None, "where checkpoints are copied to, such as s3://bucket/runs/first")
    max_steps: int = free(0, "end the run after this many steps; 0: at the end of the schedule", least=0)
    max_bad_steps: int = free(10, "end the run after this many steps in a row without a finite gradient", least=1)
    stall_seconds: float = free(600.0, "end the run when no step ends in this time", least=1)
    profile_steps: list[int] = free(list, "first and last step of a profiler's trace, such as [20,23]; empty: none")
    wandb: WandbConfig = free(WandbConfig)
    tensorboard: bool = free(False, "write event files to output_dir/tensorboard")

    def __post_init__(self) -> None:
        """Check the values; raises UserError naming the key, the value and the rule."""
        super().__post_init__()
        self._check_numbers()
        self._check_names()

    def _check_numbers(self) -> None:
        steps = self.profile_steps
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise UserError(f"profile_steps is {steps}: must be the first and the last step, such as [5,8]")
        if len(self.optimizer.opt_betas) != 2:
            raise UserError(f"optimizer.opt_betas is {self.optimizer.opt_betas}: must be two numbers")
        if not 0 <= self.scheduler.min_lr_multi <= 1:
            raise UserError(f"scheduler.min_lr_multi is {self.scheduler.min_lr_multi}: must be between 0 and 1")

    def _check_names(self) -> None:
        for name in self.test_corpus:  # folders and files are named by it, and entries of metrics.json
            if not name or name.startswith(".") or Path(name).name != name:
                raise UserError(f"test_corpus has a split {name!r}: must be a name that a file can have, without /")
            if f"{name}_emb" in self.test_corpus:
                raise UserError(
                    f"test_corpus has splits {name!r} and '{name}_emb', which is what the results of {name!r} by the "
                    "dual encoder are called: give one of them another name"
                )
        listed = ", ".join(self.test_corpus) or "none"
        unknown = [name for name in self.splits if name not in self.test_corpus]
        if unknown:
            raise UserError(
                f"splits names {unknown[0]!r}, test_corpus has {listed}: name some of these, or splits=[] for all"
            )
        if self.label is not None and (self.label in ("", "..") or Path(self.label).name != self.label):
            raise UserError(f"label is {self.label!r}, must be the name of a folder within OUTPUT_DIR/evaluation")
        if self.stop_key is not None and self.stop_key not in self.test_corpus:
            raise UserError(
                f"stop_key is {self.stop_key!r}, test_corpus has {listed}: name one of these, or stop_key=null"
            )

    def train_urls(self) -> list[str]:
        """URLs of the training corpora. Raises ValueError when none is named."""
        if not self.train_corpus:
            raise UserError("train_corpus is not set: give the name or the URL of a packed corpus, or a list of them")
        return resolve_corpora(self.train_corpus, self.available_corpus, "train_corpus")

    def test_urls(self) -> dict[str, str]:
        """Name -> URL of the splits that are to be evaluated."""
        result = {}
        for name in self.splits or self.test_corpus:
            urls = resolve_corpora(self.test_corpus[name], self.available_corpus, f"test_corpus.{name}")
            if len(urls) != 1:
                raise UserError(f"test_corpus.{name} means {len(urls)} corpora: a split is one corpus")
            result[name] = urls[0]
        return result


def resolve_corpora(what: Any, available: dict[str, Any], key: str) -> list[str]:
    """URLs of the corpora that `what` means: a name in `available`, a URL, a folder, or a list of them.

    available: name -> the same forms, so that names can stand for several corpora. Raises ValueError, with the name
    that `key` holds, when it stands nowhere and looks like no URL or folder.
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
