"""Starts DeepSpeed: its configuration is completed from the run's settings, which alone set what both could."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from model.vision import TimmEncoder
from runtime.errors import MissingError, UserError
from runtime.packaged import PACKAGED, find_file
from runtime.ranks import Ranks
from train.config.settings import RunConfig
from train.deepspeed.compat import broadcast_scalars, import_muon
from train.deepspeed.state import frozen_weights, keep_exact, set_optimizer_step
from train.optimizer import ParameterGroup, trainable_groups

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What the YAML decides: JSON key -> the YAML's key.
_SET_BY_YAML = {
    "train_batch_size": "batch_size",
    "train_micro_batch_size_per_gpu": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "gradient_clipping": "optimizer.max_grad_norm",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
    "optimizer": "optimizer",
    "scheduler": "scheduler",
}


def find_deepspeed_config(name: str) -> Path:
    """The ZeRO JSON of `deepspeed: NAME`: a path, or the name of a packaged one. Raises MissingError."""
    path = find_file(name)
    if path is None:
        known = ", ".join(sorted(path.name for path in (PACKAGED / "deepspeed_configs").glob("*.json")))
        raise MissingError(
            f"deepspeed={name} does not exist: give the path of a DeepSpeed JSON; deepspeed_configs/ has {known}"
        )
    return path


def deepspeed_config(run: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """The JSON that `run.deepspeed` names, completed from the run's settings.

    Raises MissingError, or UserError when it is not a JSON object or contradicts the settings.
    """
    path = find_deepspeed_config(run.deepspeed)
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # also what is not UTF-8
        raise UserError(f"{path} is not valid JSON ({error})") from None
    _check_objects(config, path)
    _check_offload(config, path)
    largest = max(run.batch_size.image, run.batch_size.video)
    micro = max(1, largest // ranks.world_size // run.accumulate)  # DeepSpeed uses it in its own reports only
    own: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": run.accumulate,
        "train_batch_size": micro * run.accumulate * ranks.world_size,
        "gradient_clipping": max(0.0, run.optimizer.max_grad_norm),
    }
    for key, yaml_key in _SET_BY_YAML.items():
        given = _get(config, key)
        expected = {**own, "bf16.enabled": run.precision == "bf16", "fp16.enabled": run.precision == "fp16"}.get(key)
        if given not in (None, "auto", expected):
            raise UserError(
                f"{path} sets {key} to {json.dumps(given)}, but the YAML sets it ({yaml_key}): remove it there"
            )
    if run.compile and _get(config, "zero_optimization.stage") == 3:
        raise UserError(
            f"compile=true does not work with ZeRO 3 ({path}), which fetches weights within a step: use ZeRO 0 to 2, "
            "or compile=false"
        )
    for name in ("bf16", "fp16"):
        config[name] = {**config.get(name, {}), "enabled": run.precision == name}
    # DeepSpeed's test of bf16 gradients waits for the device at every step; train.guard skips bad steps without it.
    config["bf16"].setdefault("check_grad_overflow", _offloads(config))
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    config["zero_optimization"] = _without_waits(config, ranks)
    config.setdefault("timers", {"throughput": {"enabled": False}})  # they wait for the device twice a step
    return {"steps_per_print": 10**9, "zero_force_ds_cpu_optimizer": False, **config, **own}


def _check_objects(config: Any, path: Path) -> None:
    """Raise UserError where a ZeRO JSON has something else than an object for itself or a section that we read."""
    if not isinstance(config, dict):
        raise UserError(f"{path} is {json.dumps(config)[:50]}: a DeepSpeed JSON is an object, {{...}}")
    for section in ("bf16", "fp16", *(f"zero_optimization{end}" for end in ("", ".offload_optimizer"))):
        if not isinstance(given := _get(config, section), dict | None):
            raise UserError(f"{path} sets {section} to {json.dumps(given)}: it must be an object, {{...}}")


def _check_offload(config: dict[str, Any], path: Path) -> None:
    """Raise UserError where a ZeRO JSON offloads to NVMe."""
    for section in ("offload_optimizer", "offload_param"):
        if _get(config, f"zero_optimization.{section}.device") == "nvme":
            raise UserError(
                f"{path} sets {section}.device to nvme: NVMe offload is no longer supported, use cpu there, as "
                "deepspeed_configs/zero3_offload.json does"
            )


def _without_waits(config: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The ZeRO section, without options that make the host wait for the device in a step."""
    zero = dict(config.get("zero_optimization", {}))
    wide = _get(config, "data_types.grad_accum_dtype") not in (None, "auto")  # then DeepSpeed requires its own norm
    if zero.get("stage") in (1, 2) and not _offloads(config) and not wide:
        # DeepSpeed launches two kernels a parameter for the norm; train.guard takes that of all of them at once.
        zero.setdefault("compute_grad_norm", False)
    if ranks.world_size == 1:  # nothing is reduced, yet DeepSpeed would wait after the backward pass
        zero["overlap_comm"] = False
    return zero


def start_engine(
    model: nn.Module, run: RunConfig, config: dict[str, Any], device: torch.device
) -> tuple[DeepSpeedEngine, list[ParameterGroup]]:
    """The DeepSpeed engine of a model, and its parameter groups in the order of the optimiser's.

    config: from `deepspeed_config`. Raises UserError when `different_lr` names an unknown module, or for an option that
    DeepSpeed refuses.
    """
    import deepspeed

    if run.compile:
        # Not `model.compile`, which would compile DeepSpeed's hooks around the call too.
        model.forward = torch.compile(model.forward, fullgraph=True)
    if _get(config, "zero_optimization.stage") == 3:
        for module in model.modules():
            if isinstance(module, TimmEncoder):
                module.weights_in_layers = True
    parameters = dict(model.named_parameters())
    groups = trainable_groups(model, run.optimizer, aligned=device.type == "cuda")
    # The schedule sets the learning rate at every step; 0 until then, for the step that DeepSpeed may begin with.
    wanted = [
        {"params": [parameters[name] for name in group.names], "lr": 0.0, "weight_decay": group.weight_decay}
        for group in groups
    ]
    exact = frozen_weights(model) if run.precision != "fp32" else {}
    broadcast_scalars(parameters, device)
    optimizer = _optimizer(wanted, run, config, device)
    if isinstance(optimizer, torch.optim.AdamW):
        config = {**config, "gradient_clipping": 0.0}  # train.guard clips, without waiting for the device
    import_muon()
    _check_options(config, run)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if exact:
        keep_exact(engine, exact)
    # Workaround (DeepSpeed 0.19.8; deepspeedai/DeepSpeed#5104 is for ZeRO only): without ZeRO, bf16 and fp16 begin with
    # an empty step, which shifts AdamW's bias correction.
    set_optimizer_step(engine, 0)
    return engine, groups


def _check_options(config: dict[str, Any], run: RunConfig) -> None:
    """Raise UserError for options of the ZeRO JSON that DeepSpeed refuses; the processes must be connected."""
    from deepspeed import DeepSpeedConfig
    from deepspeed.runtime.config import DeepSpeedConfigError
    from pydantic import ValidationError  # DeepSpeed's

    try:
        DeepSpeedConfig(copy.deepcopy(config))
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        reasons = [str(error)]
        if isinstance(error, ValidationError):
            reasons = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        path = find_deepspeed_config(run.deepspeed)
        raise UserError(f"DeepSpeed refuses {path}: {' '.join('; '.join(reasons).split())}") from error


def _optimizer(
    groups: list[dict[str, Any]], run: RunConfig, config: dict[str, Any], device: torch.device
) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW; DeepSpeed's own where a GPU's optimiser state is kept on the CPU."""
    betas = (run.optimizer.opt_betas[0], run.optimizer.opt_betas[1])
    if device.type == "cuda" and _offloads(config):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=0.0, betas=betas, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def _offloads(config: dict[str, Any]) -> bool:
    """Whether the optimiser's state is kept off the device."""
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def _get(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
