"""A run's memory does not grow with its steps."""

import pytest
from small_run import job, metrics, run_jobs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_is_flat_over_500_steps(corpora, tmp_path):
    settings = ("scheduler.epochs=100", "max_steps=500", "log_every=10", "save_every=100", "keep_checkpoints=1")
    run_jobs(tmp_path, [job("pretrain", corpora / "tiny.yaml", f"output_dir={tmp_path}/run", *settings)], timeout=800)
    used = {line["step"]: line["memory_gb"] for line in metrics(tmp_path / "run") if "memory_gb" in line}
    early = max(value for step, value in used.items() if 100 <= step <= 200)
    late = max(value for step, value in used.items() if step >= 400)
    assert late <= 1.02 * early, used


def test_the_loaders_figures_stand_beside_the_losses(tmp_path, corpora):
    run_jobs(tmp_path, [job("pretrain", corpora / "tiny.yaml", f"output_dir={tmp_path}/run", "max_steps=3")])
    steps = [line for line in metrics(tmp_path / "run") if "loss" in line]
    read = [line["loader/bytes_read"] for line in steps]
    assert read == sorted(read)
    assert read[0] > 0
    assert all(0 <= line["loader/decode_ready"] <= 1 for line in steps)
