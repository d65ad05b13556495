"""Every setting of a run: its default, its help and its rules; reading them from YAML and `key=value` overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import OmegaConf

from eval.config import EvalRunConfig, resolve_corpora
from model.config import ModelSettings
from preprocessing.frames import frame_sampler
from runtime.errors import UserError
from runtime.plugins import load_plugins
from runtime.settings import build, explicit_values, fixed, free, read_layers, setting
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

    epochs: int = setting(10, "epochs of training", least=1)
    warmup_epochs: float = setting(1.0, "epochs of linear warm-up, before cosine decay", least=0)
    image_res: dict[int, int] = setting(
        dict, "image sizes below image_res and their epochs, before the rest at image_res, such as {112: 8}",
        replaced=True,
    )  # fmt: skip
    min_lr_multi: float = setting(0.01, "the schedule's lowest learning rate over optimizer.lr, 0 to 1")


@dataclass
class WandbConfig:
    """Weights & Biases; metrics.jsonl is written in any case."""

    enable: bool = setting(False, "log to Weights & Biases")
    project: str = setting("singularity", "project of Weights & Biases")
    entity: str | None = setting(None, "user or team of Weights & Biases")
    mode: str = setting("online", "mode of Weights & Biases; offline works without a network", choices=WANDB_MODES)


@dataclass
class RunConfig(ModelSettings, EvalRunConfig):
    """A run: the settings of the model, the loader, the evaluation and the optimiser, and where files are.

    Fine-tuning and evaluation take the model's settings from the checkpoint; see train.config.architecture.
    """

    explained: ClassVar[Mapping[str, str]] = EXPLAINED

    tokenizer: str = free(
        "bert-base-uncased",
        "vocabulary: a vocab.txt or tokenizer.json, a folder that holds one, or a hub name; by default that of "
        "dual_encoder or text_encoder.pretrained, else this",
    )

    data_root: str = free("data", "folder that other settings refer to as ${data_root}")
    train_corpus: Any = fixed(None, "packed corpora to train on: a name, a URL, or a list of them")

    optimizer: OptimizerConfig = fixed(OptimizerConfig)
    scheduler: SchedulerConfig = fixed(SchedulerConfig)
    freeze: list[str] = fixed(list, "parts that are not trained, such as [vision_encoder, text_encoder.embeddings]")
    accumulate: int = free(
        1, "micro-batches that a rank's part of a batch is split into; VTC and VTM take negatives from one", least=1
    )
    gradient_checkpointing: bool = free(False, "recompute activations in the backward pass: slower, less memory")
    compile: bool = free(False, "torch.compile for the step: minutes at the start, faster steps; not with ZeRO 3")
    precision: str = fixed("bf16", "data type of the weights in a step", choices=PRECISIONS)
    deepspeed: str = free("deepspeed_configs/zero1.json", "DeepSpeed's JSON: a packaged one, or a path of your own")

    output_dir: str | None = free(None, "folder of the run")
    resume: bool = free(True, "continue the run in output_dir from its newest checkpoint")
    pretrained_path: str | None = fixed(
        None, "weights to start from: a run folder, a weights folder or an official .pth"
    )
    checkpoint: str | None = free(None, "weights to evaluate, in the same forms as pretrained_path")
    expected_tensors: list[str] = fixed(list, "tensors that may be missing, unexpected or of another shape")
    stop_key: str | None = fixed(None, "split whose metric chooses the best checkpoint; null: the last one is used")
    log_every: int = free(10, "steps between log lines", least=1)
    save_every: int = free(1000, "steps between checkpoints; also written at signals and at the end", least=1)
    save_minutes: float = free(0.0, "minutes between checkpoints, in addition; 0: never", least=0)
    keep_checkpoints: int = free(2, "checkpoints that are kept", least=1)
    checkpoint_url: str | None = free(None, "where checkpoints are copied to, such as s3://bucket/runs/first")
    max_steps: int = free(0, "finish the run after this many steps; 0: at the end of the schedule", least=0)
    max_bad_steps: int = free(10, "end the run after this many steps in a row without a finite gradient", least=1)
    stall_seconds: float = free(600.0, "end the run when no step ends in this time", least=1)
    profile_steps: list[int] = free(list, "first and last step of a profiler's trace, such as [20,23]; empty: none")
    wandb: WandbConfig = free(WandbConfig)
    tensorboard: bool = free(False, "write event files to output_dir/tensorboard")

    def __post_init__(self) -> None:
        """Check the values; raises UserError naming the key, the value and the rule."""
        super().__post_init__()
        steps = self.profile_steps
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise UserError(f"profile_steps is {steps}: must be the first and the last step, such as [5,8]")
        if len(self.optimizer.opt_betas) != 2:
            raise UserError(f"optimizer.opt_betas is {self.optimizer.opt_betas}: must be two numbers")
        if not 0 <= self.scheduler.min_lr_multi <= 1:
            raise UserError(f"scheduler.min_lr_multi is {self.scheduler.min_lr_multi}: must be between 0 and 1")
        if self.stop_key is not None and self.stop_key not in self.test_corpus:
            listed = ", ".join(self.test_corpus) or "none"
            raise UserError(
                f"stop_key is {self.stop_key!r}, test_corpus has {listed}: name one of these, or stop_key=null"
            )

    def train_urls(self) -> list[str]:
        """URLs of the training corpora. Raises ValueError when none is named."""
        if not self.train_corpus:
            raise UserError("train_corpus is not set: give the name or the URL of a packed corpus, or a list of them")
        return resolve_corpora(self.train_corpus, self.available_corpus, "train_corpus")


@dataclass(frozen=True)
class Settings:
    """A checked configuration, and which of its dotted keys the user has set (others have their defaults)."""

    config: RunConfig
    explicit: frozenset[str]


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """The configuration of the YAML at `path`, its bases and overrides; imports its plugins.

    Raises as `read_layers`, `build` and `load_plugins`, and UserError for an unknown frame sampler or augmentation.
    """
    given = read_layers(RunConfig, path, overrides)
    config = build(RunConfig, given)
    load_plugins(config.plugins, Path(path).parent)
    _check_names(config)
    return Settings(config, frozenset(key for key, _ in explicit_values(RunConfig, given)))


def _check_names(config: RunConfig) -> None:
    for sample_type in (config.video_input.sample_type, config.video_input.sample_type_test):
        frame_sampler(sample_type)  # raises where there is none
    if config.augmentations:
        from loaders.augment import AUGMENTATIONS  # PyTorch, which the plugin with the augmentations needs too

        for name in config.augmentations:
            AUGMENTATIONS[name]


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML, which `load_settings` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
