"""Under ZeRO 3 an evaluation during training gathers the weights: its metrics are those of the exported model."""

import json

import pytest
from small_run import job, run_jobs

from sharding.build import build_corpus

pytestmark = pytest.mark.timeout(400)


def test_evaluation_of_a_partitioned_model_equals_that_of_a_whole_one(corpora, tmp_path):
    shapes = corpora / "shapes"
    for name in ("qa_train", "qa_test"):
        annotations = [str(shapes / f"{name}.json")]
        build_corpus(annotations, str(shapes / "media"), "video", str(tmp_path / name), size=32, fps=4, workers=1)
    zero = tmp_path / "zero3.json"
    zero.write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 500}}')
    where = [f"deepspeed={zero}", "scheduler.epochs=2"]
    # 8 test items over 2 ranks, 3 at once; the ranks' numbers of layers called differ.
    temporal = ["add_temporal_embed=true", "temporal_vision_encoder.enable=true", "video_input.num_frames=2"]
    odd = ["batch_size_test={image: 3, video: 3}", "pair_batch_size=5"]
    questions = [
        "task=qa", "epoch_unit=questions",
        f"train_corpus={tmp_path}/qa_train", f"test_corpus.questions={tmp_path}/qa_test",
        "splits=[questions]", f"answer_list={shapes}/answer_list.json",
    ]  # fmt: skip
    tiny, tuned, asked = corpora / "tiny.yaml", tmp_path / "tuned", tmp_path / "asked"
    asking = tmp_path / "asking.yaml"
    asking.write_text("\n".join(line for line in tiny.read_text().splitlines() if not line.startswith("test_corpus")))
    launches = [
        job("finetune_retrieval", tiny, f"output_dir={tuned}", "stop_key=motion", *where, *temporal, *odd),
        job("finetune_qa", asking, f"output_dir={asked}", "stop_key=questions", *where, *questions, *odd),
        job("evaluate", tiny, f"output_dir={tmp_path}/whole", f"checkpoint={tuned}", *temporal),
        job("evaluate", asking, f"output_dir={tmp_path}/answers", f"checkpoint={asked}", *questions),
    ]
    run_jobs(tmp_path, launches)
    for run, other in ((tuned, "whole"), (asked, "answers")):
        final = json.loads((run / "evaluation/final/metrics.json").read_text())
        assert json.loads((tmp_path / other / "metrics.json").read_text()) == final
        epochs = [json.loads((run / f"evaluation/epoch_0{number}/metrics.json").read_text()) for number in (1, 2)]
        assert any(epoch.items() <= final.items() for epoch in epochs)  # that of the best weights
