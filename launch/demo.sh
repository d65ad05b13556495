#!/usr/bin/env bash
# The whole system on Shapes: generate, pack, pre-train on one frame, evaluate, fine-tune on four, evaluate, report.
# Usage: bash launch/demo.sh [FOLDER]     (`make demo` calls it)
set -euo pipefail
launch=$(dirname "$0")
out=${1:-demo}
source "$launch/steps.sh"

draw 6000 2000 256
pack image images_train images_test
pack video clips_train clips_test_appearance clips_test_motion
step vocab python -m loaders.vocab "$out/shards/images_train" "$out/shards/clips_train" --size 600 --output "$out/vocab.txt"

where=("data_root=$out/shards" "tokenizer=$out/vocab.txt")
step pretrain "${ds[@]}" "$launch/pretrain.py" configs/demo/pretrain.yaml "${where[@]}" "output_dir=$out/pretrain"
step zero_shot "${ds[@]}" "$launch/evaluate.py" configs/demo/pretrain.yaml "${where[@]}" "output_dir=$out/pretrain" \
  "checkpoint=$out/pretrain" "eval_num_frames=[1,4]"
step finetune "${ds[@]}" "$launch/finetune_retrieval.py" configs/demo/finetune.yaml "${where[@]}" "output_dir=$out/finetune" \
  "pretrained_path=$out/pretrain"
python -m eval.report "$out/pretrain" "$out/finetune" --output "$out/report.html"
finished "The report: $out/report.html"
