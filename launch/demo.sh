#!/usr/bin/env bash
# The whole system on Shapes: generate, pack, pre-train on one frame, evaluate, fine-tune on four, evaluate, report.
# Usage: bash launch/demo.sh [FOLDER]     (`make demo` calls it)
# Every command is printed as it is run, so that it can be copied. Run again after an interruption, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-demo}
mkdir -p "$out/steps"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
started=$SECONDS

# Two processes on a CPU, one a GPU where there are any.
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
  ds=(deepspeed)
else
  export DS_ACCELERATOR=cpu
  ds=(deepspeed --num_accelerators 2)
fi

step() { # step NAME COMMAND...: print and run it once, however often the demo is started
  local name=$1
  shift
  [ -e "$out/steps/$name" ] && return
  printf '\n\033[1m$ %s\033[0m\n' "$*"
  "$@"
  touch "$out/steps/$name"
}

pack() { # pack SPLIT image|video
  step "pack_$1" python -m sharding.build --annotations "$out/shapes/$1.json" --media-root "$out/shapes/media" \
    --media-type "$2" --output "$out/shards/$1" --name "$1" --size 64 --fps 4
}

step shapes python -m sharding.shapes --output "$out/shapes" --images 6000 --clips 2000 --test-items 256 --size 72
pack images_train image
pack images_test image
pack clips_train video
pack clips_test_appearance video
pack clips_test_motion video
step vocab python -m loaders.vocab "$out/shards/images_train" "$out/shards/clips_train" --size 600 --output "$out/vocab.txt"

where=("data_root=$out/shards" "tokenizer=$out/vocab.txt")
step pretrain "${ds[@]}" launch/pretrain.py configs/demo/pretrain.yaml "${where[@]}" "output_dir=$out/pretrain"
for frames in 1 4; do
  step "zero_shot_$frames" "${ds[@]}" launch/evaluate.py configs/demo/pretrain.yaml "${where[@]}" \
    "output_dir=$out/pretrain" "checkpoint=$out/pretrain" "video_input.num_frames_test=$frames"
done
step finetune "${ds[@]}" launch/finetune_retrieval.py configs/demo/finetune.yaml "${where[@]}" "output_dir=$out/finetune" \
  "pretrained_path=$out/pretrain"
python -m eval.report "$out/pretrain" "$out/finetune" --output "$out/report.html"
printf '\nDone in %d minutes. The report: %s\n' $(((SECONDS - started + 59) / 60)) "$out/report.html"
