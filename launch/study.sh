#!/usr/bin/env bash
# The paper's claim in small: on what order decides, several frames and a temporal encoder; on appearance, one frame is enough.
# Usage: bash launch/study.sh [FOLDER]     (`make study` calls it)
# Smaller: IMAGES, CLIPS, TEST_ITEMS, PRETRAIN_EPOCHS, FINETUNE_EPOCHS. Run again after an interruption, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-study}
mkdir -p "$out/steps"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false DS_ACCELERATOR=cpu
started=$SECONDS

step() { # step NAME COMMAND...: print and run it once, however often the study is started
  local name=$1
  shift
  [ -e "$out/steps/$name" ] && return
  printf '\n\033[1m$ %s\033[0m\n' "$*"
  "$@"
  touch "$out/steps/$name"
}

pack() { # pack ANNOTATIONS image|video
  step "pack_$1" python -m sharding.build --annotations "$out/shapes/$1.json" --media-root "$out/shapes/media" \
    --media-type "$2" --output "$out/shards/$1" --name "$1" --size 64 --fps 4
}

step shapes python -m sharding.shapes --output "$out/shapes" --images "${IMAGES:-6000}" --clips "${CLIPS:-2000}" \
  --test-items "${TEST_ITEMS:-256}" --size 72
pack images_train image
for name in clips_train ssv2_train ssv2_test clips_test_appearance; do pack "$name" video; done
step vocab python -m loaders.vocab "$out/shards/images_train" "$out/shards/clips_train" "$out/shards/ssv2_train" \
  --size 600 --output "$out/vocab.txt"

run() { # run NAME SCRIPT CONFIG SETTINGS...: a training of our own, on two processes
  local name=$1 script=$2 config=$3
  shift 3
  step "$name" deepspeed --num_accelerators 2 "launch/$script.py" "configs/$config.yaml" "data_root=$out/shards" \
    "output_dir=$out/$name" "$@"
}

run pretrain pretrain demo/pretrain "tokenizer=$out/vocab.txt" "scheduler.epochs=${PRETRAIN_EPOCHS:-10}"
tuning=("pretrained_path=$out/pretrain" "scheduler.epochs=${FINETUNE_EPOCHS:-5}")
run single finetune_retrieval study/finetune "${tuning[@]}" video_input.num_frames=1 add_temporal_embed=false \
  temporal_vision_encoder.enable=false
run temporal finetune_retrieval study/finetune "${tuning[@]}"
python launch/study.py "$out"
python -m train.plot "$out/single" "$out/temporal" --output "$out/curves.png"
printf '\nDone in %d minutes: %s\n' $(((SECONDS - started + 59) / 60)) "$out/study.md $out/study.png"
