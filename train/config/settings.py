"""Every setting of a run, checked: what a YAML may hold, and the values it has when it says nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from eval.config import EvalConfig
from loaders.config import LoaderConfig
from model.config import AnswerDecoderConfig, LossWeights, TemporalConfig, TextConfig, VisionConfig
from runtime.errors import UserError
from runtime.settings import evaluation, fixed, free

PRECISIONS = ("bf16", "fp16", "fp32")
WANDB_MODES = ("online", "offline", "disabled")


@dataclass
class DifferentLearningRate:
    """Modules with a learning rate of their own."""

    enable: bool = False
    module_names: list[str] = field(default_factory=list)  # for example [temporal_vision_encoder]
    lr: float = 1e-3


@dataclass
class OptimizerConfig:
    """AdamW. No weight decay on biases and on parameters of one dimension."""

    lr: float = 1e-4
    opt_betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.02
    max_grad_norm: float = -1.0  # gradients are clipped to this norm; 0 or less: not at all
    different_lr: DifferentLearningRate = field(default_factory=DifferentLearningRate)


@dataclass
class SchedulerConfig:
    """Linear warm-up, then cosine decay to `min_lr_multi` times the learning rate."""

    epochs: int = 10
    warmup_epochs: float = 1.0
    min_lr_multi: float = 0.01


@dataclass
class WandbConfig:
    """Weights & Biases; metrics.jsonl is written in any case."""

    enable: bool = False
    project: str = "singularity"
    entity: str | None = None
    mode: str = "online"  # online | offline | disabled


@dataclass
class RunConfig(LoaderConfig, EvalConfig):
    """A run: the loader's and the evaluation's settings, the model's, the optimiser's, and where things lie."""

    # The model. Fine-tuning and evaluation take it from the checkpoint; see train.config.architecture.
    vision_encoder: VisionConfig = fixed(factory=VisionConfig)
    text_encoder: TextConfig = fixed(factory=TextConfig)
    temporal_vision_encoder: TemporalConfig = fixed(factory=TemporalConfig)
    answer_decoder: AnswerDecoderConfig = fixed(factory=AnswerDecoderConfig)  # enabled by task=qa
    add_temporal_embed: bool = fixed(False)
    embed_dim: int = fixed(256)
    temp: float = fixed(0.07)
    itm_hard_neg: bool = fixed(True)
    gather_negatives: bool = fixed(False)  # of all processes; costs their tokens' memory and their transport
    mlm_prob: float = fixed(0.5)
    loss_weight: LossWeights = fixed(factory=LossWeights)
    tokenizer: str = free("bert-base-uncased")  # folder with vocab.txt, vocab.txt, or hub name

    # The data. Corpora are packed ones, by URL or by their name in available_corpus.
    data_root: str = free("data")
    available_corpus: dict[str, Any] = free(factory=dict)  # name -> URL, or list of names and URLs
    train_corpus: Any = fixed(None)  # a name, a URL, or a list of them
    test_corpus: dict[str, str] = evaluation(factory=dict)  # name of the split -> corpus; or corpora, as above
    splits: list[str] = evaluation(factory=list)  # of test_corpus, to be evaluated; empty: all

    # The optimisation.
    optimizer: OptimizerConfig = fixed(factory=OptimizerConfig)
    scheduler: SchedulerConfig = fixed(factory=SchedulerConfig)
    accumulate: int = free(1)  # parts that a rank's share of a batch is computed in, one after another
    gradient_checkpointing: bool = free(False)  # compute activations again in the backward pass: more time, less memory
    compile: bool = free(False)  # the step by torch.compile: minutes at the start, faster steps; not with ZeRO 3
    precision: str = fixed("bf16")  # bf16 | fp16 | fp32
    deepspeed: str = free("deepspeed_configs/zero1.json")  # a packaged one, or a path of your own

    # The run.
    output_dir: str | None = free(None)
    resume: bool = free(True)  # go on where the run in output_dir stopped
    pretrained_path: str | None = fixed(None)  # weights to start from: a run folder, a weights folder, an official .pth
    checkpoint: str | None = free(None)  # weights to evaluate; the same forms
    expected_tensors: list[str] = fixed(factory=list)  # of those weights that need not fit; as itm_head.*
    label: str | None = free(None)  # name of the evaluation's folder; made from frames and ensemble by default
    stop_key: str | None = fixed(None)  # split whose r_mean chooses the best checkpoint; none: the last one counts
    log_every: int = free(10)  # steps
    save_every: int = free(1000)  # steps; checkpoints are also written at signals and at the end
    save_minutes: float = free(0.0)  # also when so much time has passed since the last one; 0: not
    keep_checkpoints: int = free(2)
    checkpoint_url: str | None = free(None)  # where checkpoints are copied to as well: s3://bucket/runs/first
    max_steps: int = free(0)  # ends the run after so many steps; 0: not
    max_bad_steps: int = free(10)  # ends the run when so many steps in a row have no finite gradient
    stall_seconds: float = free(600.0)  # ends the run when no step is done for so long
    profile_steps: list[int] = free(factory=list)  # first and last step of a profiler's trace; empty: none
    wandb: WandbConfig = free(factory=WandbConfig)
    tensorboard: bool = free(False)  # event files in output_dir/tensorboard beside metrics.jsonl

    def __post_init__(self) -> None:
        """Check the values; raises ValueError naming the key, the value and the rule."""
        for part in (LoaderConfig, EvalConfig):
            getattr(part, "__post_init__", lambda _: None)(self)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("wandb.mode", self.wandb.mode, WANDB_MODES)
        for name in ("log_every", "save_every", "keep_checkpoints", "image_res", "embed_dim", "accumulate"):
            _at_least(name, getattr(self, name), 1)
        for name in ("save_minutes", "max_steps"):
            _at_least(name, getattr(self, name), 0)
        for name in ("max_bad_steps", "stall_seconds"):
            _at_least(name, getattr(self, name), 1)
        steps = self.profile_steps
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise UserError(f"profile_steps is {steps}: must be the first and the last step, such as [5,8]")
        _at_least("scheduler.epochs", self.scheduler.epochs, 1)
        _at_least("scheduler.warmup_epochs", self.scheduler.warmup_epochs, 0)
        _at_least("optimizer.lr", self.optimizer.lr, 0)
        _at_least("video_input.num_frames", self.video_input.num_frames, 1)
        _at_least("video_input.num_frames_test", self.video_input.num_frames_test, 1)
        if len(self.optimizer.opt_betas) != 2:
            raise UserError(f"optimizer.opt_betas is {self.optimizer.opt_betas}: must be two numbers")
        if not 0 <= self.scheduler.min_lr_multi <= 1:
            raise UserError(f"scheduler.min_lr_multi is {self.scheduler.min_lr_multi}: must be between 0 and 1")
        for name in self.test_corpus:  # folders and files are named by it, and entries of metrics.json
            if not name or name.startswith(".") or Path(name).name != name:
                raise UserError(f"test_corpus has a split {name!r}: must be a name that a file can have, without /")
            if f"{name}_emb" in self.test_corpus:
                raise UserError(
                    f"test_corpus has splits {name!r} and '{name}_emb', which is what the results of {name!r} by the "
                    "dual encoder are called: give one of them another name"
                )
        unknown = [name for name in self.splits if name not in self.test_corpus]
        if unknown:
            raise UserError(
                f"splits names {unknown[0]!r}, test_corpus has {', '.join(self.test_corpus) or 'none'}: name some of "
                "these, or splits=[] for all"
            )
        if self.label is not None and (self.label in ("", "..") or Path(self.label).name != self.label):
            raise UserError(f"label is {self.label!r}, must be the name of a folder within OUTPUT_DIR/evaluation")
        if self.stop_key is not None and self.stop_key not in self.test_corpus:
            raise UserError(
                f"stop_key is {self.stop_key!r}, test_corpus has {', '.join(self.test_corpus) or 'none'}: name one of "
                "these, or stop_key=null"
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
    near = get_close_matches(what, available, n=3) or sorted(available)
    raise UserError(
        f"{key} names {what!r}, which is neither in available_corpus (nearest: {', '.join(near) or 'it is empty'}) "
        "nor a URL nor a folder"
    )


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


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}: must be one of {', '.join(choices)}")


def _at_least(name: str, value: float, least: int) -> None:
    if value < least:
        raise UserError(f"{name} is {value}: must be at least {least}")
