#!/usr/bin/env bash
# The paper's claim in small: on what order decides, several frames and a temporal encoder; on appearance, one frame is enough.
# Usage: bash launch/study.sh [FOLDER]     (`make study` calls it)
# Smaller: IMAGES, CLIPS, TEST_ITEMS, PRETRAIN_EPOCHS, FINETUNE_EPOCHS.
set -euo pipefail
launch=$(dirname "$0")
out=${1:-study}
source "$launch/steps.sh"

draw "${IMAGES:-6000}" "${CLIPS:-2000}" "${TEST_ITEMS:-512}"
pack image images_train
pack video clips_train clips_test_appearance ssv2_train ssv2_test
step vocab python -m loaders.vocab "$out/shards/images_train" "$out/shards/clips_train" "$out/shards/ssv2_train" \
  --size 600 --output "$out/vocab.txt"

run() { # run NAME SCRIPT CONFIG SETTINGS...: a training
  local name=$1 script=$2 config=$3
  shift 3
  step "$name" "${ds[@]}" "$launch/$script.py" "configs/$config.yaml" "data_root=$out/shards" "output_dir=$out/$name" "$@"
}

run pretrain pretrain demo/pretrain "tokenizer=$out/vocab.txt" ${PRETRAIN_EPOCHS:+"scheduler.epochs=$PRETRAIN_EPOCHS"}
tuning=("pretrained_path=$out/pretrain" ${FINETUNE_EPOCHS:+"scheduler.epochs=$FINETUNE_EPOCHS"})
run single finetune_retrieval study/finetune "${tuning[@]}" video_input.num_frames=1 add_temporal_embed=false \
  temporal_vision_encoder.enable=false
run temporal finetune_retrieval study/finetune "${tuning[@]}"
python "$launch/study.py" "$out"
python -m train.plot "$out/single" "$out/temporal" --output "$out/curves.png"
finished "$out/study.md $out/study.png"
