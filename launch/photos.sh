#!/usr/bin/env bash
# Photos with captions of one's own: pack them, train on them, evaluate, report.
# Usage: bash launch/photos.sh FOLDER CAPTIONS [TEST] [OUTPUT] [FROM]     (`make photos FOLDER=... CAPTIONS=...` calls it)
#   FOLDER    of the photos              CAPTIONS  JSON list of {"image": path in FOLDER, "caption": text or [texts]}
#   TEST      such a list of other photos to evaluate on; by default every tenth photo of CAPTIONS, which training leaves out
#   FROM      weights: published ones, configs/small/transfer.yaml (default); nothing: configs/small/from_nothing.yaml
set -euo pipefail
launch=$(dirname "$0")
media=${1:-} train=${2:-} test=${3:-} out=${4:-photos} from=${5:-weights}
declare -A recipes=([weights]=transfer [nothing]=from_nothing)
[ -n "${recipes[$from]:-}" ] || echo "error: FROM is $from: must be weights or nothing" >&2
if [ -z "$media" ] || [ -z "$train" ] || [ -z "${recipes[$from]:-}" ]; then
  sed -n '3,6s/^# //p' "$0" >&2
  exit 2
fi
recipe=configs/small/${recipes[$from]}.yaml
source "$launch/steps.sh"

inputs=("$media" "$train" "$test")
[ "$from" = weights ] || inputs+=("from $from")
same_inputs "${inputs[@]}"
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
if [ "$from" = nothing ]; then
  step vocab python -m loaders.vocab "$out/shards/photos" --size 4000 --output "$out/shards/vocab.txt"
  step filters python -m train.filters "$recipe" "data_root=$out/shards"
fi
where=("data_root=$out/shards" "output_dir=$out/run")
step train "${ds[@]}" "$launch/pretrain.py" "$recipe" "${where[@]}"
step evaluate "${ds[@]}" "$launch/evaluate.py" "$recipe" "${where[@]}" "checkpoint=$out/run"
python -m eval.report "$out/run" --output "$out/report.html"
finished "The report: $out/report.html; search: singularity search $out/run $out/shards/photos_test \"two dogs in the snow\" --serve"
