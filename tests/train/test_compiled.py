"""A run with its step compiled takes the steps of one without; and says at once where that cannot be."""

import pytest
import torch
from small_engine import SMALL
from small_run import job, learned, run_jobs

from model.singularity import Singularity
from runtime.ranks import Ranks
from train.config.settings import RunConfig
from train.deepspeed.engine import deepspeed_config

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
        ValueError, match=r"compile=true does not work with ZeRO 3 .*: use ZeRO 0 to 2, or compile=false"
    ):
        deepspeed_config(RunConfig(**settings), Ranks())
    assert deepspeed_config(RunConfig(compile=True, deepspeed="deepspeed_configs/zero2.json"), Ranks())


def test_texts_of_every_length_share_two_compiled_steps():
    """The first length has its own; the second makes the length a variable, so that no text is padded to a third."""
    torch.compiler.reset()  # other tests of this process have compiled the same function
    graphs = []
    model = Singularity(SMALL, pad_id=0, cls_id=2, mask_id=4).train()

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model.forward, fullgraph=True, backend=backend)
    for length in (8, 16, 12, 4, 16, 8):
        ids = torch.randint(5, 40, (4, length))
        losses = compiled(torch.randn(4, 1, 3, 32, 32), ids, torch.ones_like(ids), torch.arange(4))
        assert all(loss.isfinite() for loss in losses.values())
    assert len(graphs) == 2
