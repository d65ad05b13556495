#!/usr/bin/env bash
# Everything that is worth measuring on a machine with a GPU, one after another, on a Shapes corpus of its own.
# Usage: bash benchmarks/gpu.sh [FOLDER]     half an hour on one GPU; FOLDER/summary.txt, and each part's whole output
#        SMALL=1 bash benchmarks/gpu.sh [FOLDER]     the same parts, tiny, on a CPU: whether they run
#        BATCH=32 bash benchmarks/gpu.sh [FOLDER]    where the GPU's memory is small; 128 is the default
# A part that fails does not stop the others; the exit code is then 1. Run again, it goes on after what is done.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu}
source launch/steps.sh

if [ -n "${SMALL:-}" ]; then
  export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
  images=48 clips=24 test_items=8 pixels=72 size=tiny device=cpu precision=fp32 batch=8 few=4
  decode=(--size 64 --batch 16 --rounds 1 --seconds 0.2) bench=(--size 64 --batch-size 16 --seconds 0.5)
  train=(--steps 2 --blocks 1) model=(--batch 4 --repeats 1) gallery=16 match=(--k_test 4 --repeats 1 --frames 2)
else
  python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "PyTorch finds no GPU here. SMALL=1 tries the same parts on a CPU." >&2
    exit 2
  }
  images=8192 clips=2048 test_items=64 pixels=256 size=base device=cuda precision=bf16 batch=${BATCH:-128}
  few=$((batch / 4)) decode=(--size 224 --batch 128) bench=(--size 224 --batch-size 128)
  train=(--steps 40 --blocks 5 --threads 0) model=(--batch "$batch" --repeats 10) gallery=1000 match=(--k_test 128)
fi

prepare() { # prepare: draw and pack Shapes, learn their words
  local name medium
  step shapes python -m sharding.shapes --output "$out/shapes" --images $images --clips $clips --test-items $test_items \
    --size $pixels
  for name in images_train clips_train; do
    medium=$([ $name = images_train ] && echo image || echo video)
    step "pack_$name" python -m sharding.build --annotations "$out/shapes/$name.json" --media-root "$out/shapes/media" \
      --media-type $medium --output "$out/shards/$name" --name $name --size $pixels --fps 4
  done
  step vocab python -m loaders.vocab "$out/shards/images_train" "$out/shards/clips_train" --size 600 --output "$out/vocab.txt"
}

part() { # part NAME TITLE COMMAND...: run it, its output into FOLDER/NAME.txt
  local name=$1 title=$2 began=$SECONDS
  shift 2
  titles+=("$name	$title	$*")
  [ -e "$out/steps/$name" ] && return
  printf '\n\033[1m%s\033[0m\n$ %s\n' "$title" "$*"
  if "$@" >"$out/$name.txt" 2>"$out/$name.log"; then
    touch "$out/steps/$name"
    cat "$out/$name.txt"
  else
    printf 'FAILED after %d s, see %s\n' $((SECONDS - began)) "$out/$name.log" | tee -a "$out/$name.txt"
    tail -n 5 "$out/$name.log"
  fi
}

prepare
titles=()
photos=$out/shards/images_train videos=$out/shards/clips_train
training=(python benchmarks/training.py --size $size --precision $precision --tokenizer "$out/vocab.txt" "${train[@]}")
part decoding "Decoding: DALI against the CPU" python benchmarks/decoding.py "$photos" "${decode[@]}"
part stream_dali "Images a second, shards to batches, DALI" python -m loaders.bench "$photos" --decode dali "${bench[@]}"
part stream_cpu "The same, decoded by the CPU" python -m loaders.bench "$photos" --decode cpu "${bench[@]}"
part pretrain "Pre-training on single frames" "${training[@]}" --corpus "$photos" --batch $batch --ways path
part overhead "The same beside the model alone" "${training[@]}" --corpus "$photos" --batch $batch
part finetune "Fine-tuning on 4 frames" "${training[@]}" --corpus "$videos" --batch $few --frames 4 --ways path
part model "The model against the straightforward way" python benchmarks/model.py --size $size --device $device \
  --dtype $precision --trim "${model[@]}"
part evaluation "Re-ranking against one query at a time" python benchmarks/evaluation.py --size $size --device $device \
  --gallery $gallery "${match[@]}"
part throughput "Evaluation" python benchmarks/evaluation.py --size $size --device $device --grow $gallery "${match[@]}"

failed=0
{
  date -u '+%F %H:%M UTC'
  [ $device = cpu ] && echo "CPU" || nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
  python -c 'import torch, deepspeed; print("torch", torch.__version__, "deepspeed", deepspeed.__version__)' 2>/dev/null | tail -n 1
  for line in "${titles[@]}"; do
    IFS='	' read -r name title command <<<"$line"
    printf '\n%s\n$ %s\n' "$title" "$command"
    cat "$out/$name.txt"
    [ -e "$out/steps/$name" ] || failed=1
  done
} >"$out/summary.txt"
finished "The summary: $out/summary.txt"
exit $failed
