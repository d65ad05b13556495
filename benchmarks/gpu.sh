#!/usr/bin/env bash
# Checks and measures a machine with a GPU in 15 minutes, one part after another.
# Usage: bash benchmarks/gpu.sh [FOLDER]     generates a small Shapes corpus, then runs all parts
#        SMALL=1 bash benchmarks/gpu.sh [FOLDER]     the same parts, tiny, on a CPU, to test that they run
#   PARTS=a           only load a (training, evaluation; without DALI), only load b (DALI, a run), or parts by name
#   CORPORA=FOLDER    existing packed corpora: FOLDER/photos, FOLDER/clips, FOLDER/vocab.txt
#   LIMIT=900         seconds for everything; parts that no longer fit are skipped
#   BATCH=32          for little GPU memory; the default is 128
# Each part has its own time limit. A part that fails or hangs does not stop the others; the exit code is then 1. Checks
# run first in each load, except for damaged images, for which time is reserved; torch.compile runs last. Run the script
# again to continue. FOLDER/NAME.txt has the whole output of a part, FOLDER/results.tgz everything. The last lines are
# JSON, one for each part: name, status (ok, failed, timeout, skipped), seconds, results.
#
# On a machine without a network, av and webdataset are not needed with corpora packed elsewhere (15 MB):
#   python -m sharding.build --annotations photos.json --media-root images --media-type image --limit 1000 --size 256 \
#     --output .gpu/corpora/photos
#   python -m sharding.shapes --output /tmp/shapes --images 8 --clips 256 --test-items 8 --size 256
#   python -m sharding.build --annotations /tmp/shapes/clips_train.json --media-root /tmp/shapes/media \
#     --media-type video --max-frames 4 --size 256 --output .gpu/corpora/clips
#   python -m loaders.vocab .gpu/corpora/photos .gpu/corpora/clips --size 4000 --output .gpu/corpora/vocab.txt
# There, in two runs (first unpack missing packages into /tmp/site: wheels and DeepSpeed, then DALI):
#   PYTHONPATH=/tmp/site CORPORA=.gpu/corpora PARTS=a LIMIT=420 bash benchmarks/gpu.sh /tmp/gpu
#   PYTHONPATH=/tmp/site CORPORA=.gpu/corpora PARTS=b LIMIT=270 bash benchmarks/gpu.sh /tmp/gpu
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu}
python=$(command -v python || command -v python3)
limit_of_all=${LIMIT:-900} parts=" ${PARTS:-a b} "
[ -n "${SMALL:-}" ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) < 8 ? $(nproc) : 8))}
[ -z "${SMALL:-}" ] || export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
source launch/steps.sh

if [ -n "${SMALL:-}" ]; then
  slack=3 images=64 clips=24 pixels=72 size=tiny device=cpu precision=fp32 batch=8 large=16 few=4
  pictures=(--pixels 64 --batch 16 --images 32) decoding=(--size 64 --batch 16 --images 64 --rounds 1 --seconds 0.1)
  stream=(--size 64 --batch-size 16 --seconds 0.5) train=(--steps 2 --blocks 1) model=(--batch 4 --repeats 1)
  gallery=16 many=32 match=(--k_test 4 --repeats 1 --frames 2) run=(--batch 16 --steps 8 --k_test 4)
  profile=("${train[@]}") compile=(--size least --warm-up 1 --steps 1)
else
  fault=$(env -u DS_ACCELERATOR "$python" -c 'import torch; from train.job.devices import gpu_fault
print(gpu_fault()); raise SystemExit(not torch.cuda.is_available())') || {
    echo "${fault:-PyTorch finds no GPU here}. SMALL=1 runs the same parts on a CPU." >&2
    exit 2
  }
  export DS_ACCELERATOR=cuda
  slack=1 images=1024 clips=256 pixels=256 size=base device=cuda precision=bf16 batch=${BATCH:-128}
  large=$((batch * 3)) few=$((batch / 4))
  pictures=(--batch 128) decoding=(--rounds 1 --seconds 2) stream=(--seconds 6)
  train=(--steps 30 --blocks 3 --threads 0) model=(--batch "$batch" --repeats 5)
  gallery=200 many=1000 match=(--k_test 128 --repeats 1) run=(--precision bf16)
  profile=(--threads 0) compile=(--steps 20 --blocks 2)
fi

prepare() { # prepare: generate and pack corpora in $corpora, unless given
  corpora=${CORPORA:-$out/corpora}
  local name medium missing=
  if [ -n "${CORPORA:-}" ]; then
    for name in photos/corpus.json clips/corpus.json vocab.txt; do
      [ -e "$corpora/$name" ] || missing="$missing $corpora/$name"
    done
    [ -z "$missing" ] && return
    echo "CORPORA=$CORPORA lacks$missing: pack it as described at the top of benchmarks/gpu.sh, or unset CORPORA." >&2
    exit 2
  fi
  step shapes "$python" -m sharding.shapes --output "$out/shapes" --images $images --clips $clips --test-items 8 \
    --size $pixels
  for name in photos clips; do
    medium=$([ $name = photos ] && echo image || echo video)
    step "pack_$name" "$python" -m sharding.build --annotations "$out/shapes/${name/photos/images}_train.json" \
      --media-root "$out/shapes/media" --media-type $medium --output "$corpora/$name" --name $name --size $pixels \
      --max-frames 4
  done
  step vocab "$python" -m loaders.vocab "$corpora/photos" "$corpora/clips" --size 4000 --output "$corpora/vocab.txt"
}

wanted() { # wanted NAME: whether PARTS contains a part or its load
  [[ $parts == *" $load "* || $parts == *" $1 "* ]]
}

part() { # part NAME SECONDS TITLE COMMAND...: run it with a time limit, output in FOLDER/NAME.txt
  local name=$1 limit=$(($2 * slack)) title=$3 status=ok began=$SECONDS code=0
  shift 3
  wanted "$name" || return 0
  if [ -e "$out/steps/$name" ]; then
    printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$status" "$(cat "$out/steps/$name")" "$title" "$*" >>"$out/parts.tsv"
    return 0
  fi
  ((limit <= limit_of_all - reserve - SECONDS)) || limit=$((limit_of_all - reserve - SECONDS))
  printf '\n\033[1m%s\033[0m\n$ %s\n' "$title" "$*"
  if ((limit < 3)); then
    status=skipped
    rm -f "$out/$name.txt" "$out/$name.log"
  else
    timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>"$out/$name.log" &
    running=$!
    wait "$running" || code=$?
    running=
    case $code in
      0) echo $((SECONDS - began)) >"$out/steps/$name" ;;
      124) status=timeout ;;
      137) status=$([ $((SECONDS - began)) -ge "$limit" ] && echo timeout || echo failed) ;;
      *) status=failed ;;
    esac
    cat "$out/$name.txt"
  fi
  if [ $status != ok ]; then
    printf '%s after %d s, limit %d s: %s\n' "$status" $((SECONDS - began)) "$limit" "$out/$name.log"
    tail -n 3 "$out/$name.log" 2>/dev/null || true
  fi
  printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$status" $((SECONDS - began)) "$title" "$*" >>"$out/parts.tsv"
}

results() { # results: summary, archive, a line of JSON for each part
  finished "The summary: $out/summary.txt, all output: $out/results.tgz"
  "$python" benchmarks/gpu_results.py "$out"
}

running= reserve=0
: >"$out/parts.tsv"
trap '[ -z "$running" ] || kill "$running"; results; exit 130' INT TERM
prepare
photos=$corpora/photos videos=$corpora/clips vocab=$corpora/vocab.txt
# The photos are few: traversals are joined to long epochs, as in large corpora.
training=("$python" benchmarks/training.py --json --size $size --precision $precision --tokenizer "$vocab" --passes 20)
training+=("${train[@]}")
evaluation=("$python" benchmarks/evaluation.py --size $size --device $device --dtype $precision "${match[@]}")
check=("$python" benchmarks/gpu_check.py)

load=a
part versions 40 "Versions" "${check[@]}" versions
part losses 60 "Losses and gradients, GPU against CPU" "${check[@]}" losses --size $size
part pretrain 100 "Pre-training on single frames, the loader, DeepSpeed and the model alone" \
  "${training[@]}" --corpus "$photos" --batch $batch --decode cpu
part pretrain_large 70 "Pre-training on single frames, a large batch" \
  "${training[@]}" --corpus "$photos" --batch $large --decode cpu --ways path
part straightforward 70 "The model against a straightforward implementation under autocast" \
  "$python" benchmarks/model.py --size $size --device $device --dtype $precision --trim "${model[@]}"
part profile 70 "Profile of a step, synchronisations with the device, cuDNN attention" \
  "$python" benchmarks/gpu_profile.py --size $size --precision $precision --tokenizer "$vocab" --corpus "$photos" \
  --passes 20 --batch $batch --decode cpu --trace "$out/trace.json.gz" "${profile[@]}"
part finetune 60 "Fine-tuning on 4 frames" \
  "${training[@]}" --corpus "$videos" --batch $few --frames 4 --decode cpu --ways path
part evaluation 60 "Re-ranking against one query at a time" "${evaluation[@]}" --gallery $gallery
part evaluation_large 40 "Evaluation" "${evaluation[@]}" --grow $many

load=b
# Reserve time for the last part, which is a check.
! wanted damaged || [ -e "$out/steps/damaged" ] || reserve=20
part pictures 60 "DALI's pixels against the CPU's, also with a busy device" \
  "${check[@]}" pictures "$photos" "${pictures[@]}"
part run 150 "A run that is stopped, resumed and evaluated" \
  "$python" benchmarks/gpu_run.py "$photos" --tokenizer "$vocab" --output "$out/run" "${run[@]}"
part stream_dali 40 "Images/s, shards to batches, DALI" \
  "$python" -m loaders.bench "$photos" --json --decode dali "${stream[@]}"
part pretrain_dali 70 "Pre-training on single frames, decoded by DALI" \
  "${training[@]}" --corpus "$photos" --batch $batch --decode dali --ways path
part decoding 90 "Images/s: DALI settings and the CPU" \
  "$python" benchmarks/decoding.py "$photos" --hw-load 0 0.65 1 --fancy on off "${decoding[@]}"
part stream_cpu 40 "The same, decoded by the CPU" \
  "$python" -m loaders.bench "$photos" --json --decode cpu "${stream[@]}"
reserve=0
part damaged 40 "Damaged images" "${check[@]}" damaged "$photos" "${pictures[@]}"

load=a
part compile 240 "Pre-training on single frames, a large batch under torch.compile" \
  "${training[@]}" --corpus "$photos" --batch $large --decode cpu --ways path --compile "${compile[@]}"

[ -s "$out/parts.tsv" ] || {
  echo "PARTS=$PARTS names no part: a, b, or names such as pretrain (see benchmarks/gpu.sh)" >&2
  exit 2
}
results
