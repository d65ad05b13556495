#!/usr/bin/env bash
# Photos with captions of one's own: pack them, train configs/small/transfer.yaml from published weights, evaluate, report.
# Usage: bash launch/photos.sh FOLDER CAPTIONS [TEST] [OUTPUT]     (`make photos FOLDER=... CAPTIONS=...` calls it)
#   FOLDER    of the photos              CAPTIONS  JSON list of {"image": path in FOLDER, "caption": text or [texts]}
#   TEST      such a list of other photos to evaluate on; by default every tenth photo of CAPTIONS, which training leaves out
set -euo pipefail
launch=$(dirname "$0")
if [ -z "${1:-}" ] || [ -z "${2:-}" ]; then
  sed -n '3,5s/^# //p' "$0" >&2
  exit 2
fi
media=$1 train=$2 test=${3:-} out=${4:-photos}
source "$launch/steps.sh"

same_inputs "$media" "$train" "$test"
if [ -z "$test" ]; then
  step hold_out python "$launch/photos.py" "$train" "$out/captions"
  train=$out/captions/train.json test=$out/captions/test.json
fi
pack_photos() { # pack_photos NAME CAPTIONS
  step "pack_$1" python -m sharding.build --annotations "$2" --media-root "$media" --media-type image \
    --output "$out/shards/$1" --size 160
}
pack_photos photos "$train"
pack_photos photos_test "$test"
where=("data_root=$out/shards" "output_dir=$out/run")
step train "${ds[@]}" "$launch/pretrain.py" configs/small/transfer.yaml "${where[@]}"
step evaluate "${ds[@]}" "$launch/evaluate.py" configs/small/transfer.yaml "${where[@]}" "checkpoint=$out/run"
python -m eval.report "$out/run" --output "$out/report.html"
finished "The report: $out/report.html; search: singularity search $out/run $out/shards/photos_test \"two dogs in the snow\" --serve"
