"""Keys that are not settings: those of the official YAMLs (docs/migrating.md has the whole table), and removed ones."""

from __future__ import annotations

RENAMED = {
    "train_file": "train_corpus",
    "test_file": "test_corpus",
    "test_types": "splits",
    "is_paragraph_retrieval": "paragraph",
    "has_multi_vision_gt": "nothing: it is found in the data",
    "caption_type": "nothing: a recipe each, configs/retrieval/ssv2_label.yaml and ssv2_template.yaml",
    "dataset_name": "benchmark",
    "text_decoder": "answer_decoder.num_layers",
    "eos": "nothing: answers end in [SEP]",
    "device": "nothing: the launcher decides",
    "dist_url": "nothing: the launcher decides",
    "distributed": "nothing: the launcher decides",
    "debug": "max_steps",
    "vit_type": "vision_encoder.type",
    "vit_name_or_pretrained_path": "vision_encoder.pretrained",
    "vit_zoo": "vision_encoder.pretrained",
    "bert_config": "text_encoder.*",
    "fp16": "precision",
    "log_freq": "log_every",
    "num_workers": "threads",
    "evaluate": "`deepspeed launch/evaluate.py`",
    "optimizer.opt": "nothing: the optimiser is AdamW",
    "scheduler.sched": "nothing: the schedule is cosine",
    "video_input.reader": "decode",
    "anno_root_pt": "data_root",
    "anno_root_downstream": "data_root",
}
REMOVED = {"nvme_path": "NVMe offload is no longer supported, use deepspeed=deepspeed_configs/zero3_offload.json"}
EXPLAINED = {key: f"unknown key {key!r}: here it is {name}" for key, name in RENAMED.items()} | {
    key: f"unknown key {key!r}: {remedy}" for key, remedy in REMOVED.items()
}
