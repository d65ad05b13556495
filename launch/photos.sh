#!/usr/bin/env bash
# Photos with captions of one's own: pack them, train configs/small/transfer.yaml from published weights, evaluate, report.
# Usage: bash launch/photos.sh FOLDER CAPTIONS [TEST] [OUTPUT]     (`make photos FOLDER=... CAPTIONS=...` calls it)
#   FOLDER    of the photos              CAPTIONS  JSON list of {"image": path in FOLDER, "caption": text or [texts]}
#   TEST      such a list of other photos to evaluate on; by default every tenth photo of CAPTIONS, which training leaves out
set -euo pipefail
launch=$(dirname "$0")
[ $# -ge 2 ] || { sed -n 's/^# Usage: \(bash[^(]*\).*/usage: \1/p' "$0" >&2; exit 2; }
media=$1 train=$2 test=${3:-} out=${4:-photos}
source "$launch/steps.sh"

if [ -z "$test" ]; then
  step hold_out python - "$train" "$out" <<'PYTHON'
import json, sys
try:
    rows = json.load(open(sys.argv[1]))
    assert isinstance(rows, list) and len(rows) >= 10
except (OSError, ValueError, AssertionError) as error:
    sys.exit(f"error: {sys.argv[1]} is no JSON list of 10 photos or more ({error or 'see --help of singularity pack'}): give TEST, captions of other photos")
for name, chosen in (("test", rows[::10]), ("train", [row for i, row in enumerate(rows) if i % 10])):
    json.dump(chosen, open(f"{sys.argv[2]}/{name}.json", "w"))
PYTHON
  train=$out/train.json test=$out/test.json
fi
for name in photos photos_test; do
  captions=$train
  [ $name = photos ] || captions=$test
  step "pack_$name" python -m sharding.build --annotations "$captions" --media-root "$media" --media-type image \
    --output "$out/shards/$name" --size 160
done
where=("data_root=$out/shards" "output_dir=$out/run")
step train "${ds[@]}" "$launch/pretrain.py" configs/small/transfer.yaml "${where[@]}"
step evaluate "${ds[@]}" "$launch/evaluate.py" configs/small/transfer.yaml "${where[@]}" "checkpoint=$out/run"
python -m eval.report "$out/run" --output "$out/report.html"
finished "The report: $out/report.html; search: singularity search $out/run $out/shards/photos_test \"two dogs in the snow\" --serve"
