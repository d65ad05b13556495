"""A run with its step compiled takes the steps of one without; and says at once where that cannot be."""

import pytest
from small_run import job, learned, run_jobs

from train.config import RunConfig
from train.engine import deepspeed_config
from train.ranks import Ranks

pytestmark = pytest.mark.timeout(1800)

# Nothing is drawn: compiled dropout and draws take other random numbers.
CERTAIN = (
    "loss_weight={itc: 1, itm: 0, mlm: 0}", "text_encoder.dropout=0", "vision_encoder.drop_path=0", "max_steps=6",
    "scheduler.epochs=1",
)  # fmt: skip


@pytest.mark.slow
def test_a_compiled_run_takes_the_same_steps(corpora, tmp_path):
    jobs = [
        job("pretrain", corpora / "tiny.yaml", f"output_dir={tmp_path}/{name}", f"compile={name}", *CERTAIN)
        for name in ("true", "false")
    ]
    run_jobs(tmp_path, jobs, processes=1, timeout=1700)
    compiled, plain = learned(tmp_path / "true"), learned(tmp_path / "false")
    assert len(compiled) == len(plain) == 6  # of images and of clips
    for one, other in zip(compiled, plain):
        assert one["loss_itc"] == pytest.approx(other["loss_itc"], rel=1e-4)


def test_a_partitioned_model_is_not_compiled():
    settings = {"compile": True, "deepspeed": "deepspeed_configs/zero3.json"}
    with pytest.raises(
        ValueError, match=r"compile=true does not go with ZeRO 3 .*: take ZeRO 0 to 2, or compile=false"
    ):
        deepspeed_config(RunConfig(**settings), Ranks())
    assert deepspeed_config(RunConfig(compile=True, deepspeed="deepspeed_configs/zero2.json"), Ranks())
