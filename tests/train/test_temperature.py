"""The learned temperature stays in its range in what the optimiser changes, whichever ZeRO stage keeps it."""

import pytest
from safetensors.torch import load_file
from small_run import job, run_jobs

from model.singularity import TEMPERATURE_RANGE

pytestmark = pytest.mark.timeout(600)


def test_the_kept_temperature_is_clamped_in_every_stage(corpora, tmp_path):
    stages = [f"zero{stage}" for stage in range(4)]
    settings = "temp=0.9", "precision=bf16", "max_steps=2", "scheduler.epochs=1"
    jobs = [
        job(
            "pretrain",
            corpora / "tiny.yaml",
            f"output_dir={tmp_path}/{name}",
            f"deepspeed=deepspeed_configs/{name}.json",
            *settings,
        )
        for name in stages
    ]
    run_jobs(tmp_path, jobs)
    for name in stages:
        weights = load_file(tmp_path / name / "checkpoints/step_00000002/weights/model.safetensors")
        low, high = TEMPERATURE_RANGE
        assert low <= weights["temp"].item() <= high, name
