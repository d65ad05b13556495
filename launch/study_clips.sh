#!/usr/bin/env bash
# The paper's claim on your own clips: what a model makes of 1 frame, of 4, and of 4 in another order, before and after
# fine-tuning on 1 frame and on 4; retrieval and questions, appearance and motion.
# Usage: [MOTION="PATTERN ..."] bash launch/study_clips.sh CHECKPOINT OUTPUT FOLDER...
#   FOLDER holds clips anywhere below it and JSON lists of {"video" or "image": file, "caption": ...} or {..., "question",
#   "answer", "question_id"}. Clips of a list with "train" in its name are for fine-tuning, all others for tests.
#   MOTION: patterns of the clips' names and of question ids that only motion tells apart; the others are of appearance.
# Fewer: FINETUNE_EPOCHS. Another size of the stored frames: SIZE.
set -euo pipefail
if [ $# -lt 3 ]; then
  sed -n '2,8s/^# //p' "$0" >&2
  exit 2
fi
launch=$(dirname "$0")
checkpoint=$1 out=$2
shift 2
source "$launch/steps.sh"

same_inputs "$checkpoint" "$@" "${MOTION:-}"
step annotations python "$launch/study_clips.py" annotations "$@" --output "$out/annotations" --motion "${MOTION:-}"
root=$(cat "$out/annotations/media_root")
for name in every train held_out; do
  [ -e "$out/annotations/$name.json" ] || continue
  step "pack_$name" python -m sharding.build --annotations "$out/annotations/$name.json" --media-root "$root" \
    --media-type video --output "$out/shards/$name" --name "$name" --size "${SIZE:-256}" --fps 6
done

tested() { # tested NAME CHECKPOINT CORPUS SETTINGS...: by 1 frame, by 4, and by 4 in another order
  local name=$1 command=(python "$launch/evaluate.py" configs/study/clips.yaml "checkpoint=$2" "output_dir=$out/$1"
    "data_root=$out/shards" "test_corpus.clips=$out/shards/$3" "${@:4}")
  step "${name}_tested" "${command[@]}" "eval_num_frames=[1,4]"
  step "${name}_shuffled" "${command[@]}" label=shuffled video_input.sample_type_test=shuffled
}

tuned() { # tuned NAME SCRIPT SETTINGS...: fine-tuned from the checkpoint
  local name=$1 script=$2
  shift 2
  step "$name" "${ds[@]}" "$launch/$script.py" configs/study/clips.yaml "data_root=$out/shards" \
    "pretrained_path=$checkpoint" "output_dir=$out/$name" ${FINETUNE_EPOCHS:+"scheduler.epochs=$FINETUNE_EPOCHS"} "$@"
}

tested given "$checkpoint" every
single=(video_input.num_frames=1 add_temporal_embed=false temporal_vision_encoder.enable=false)
temporal=(video_input.num_frames=4 add_temporal_embed=true temporal_vision_encoder.enable=true
  temporal_vision_encoder.update_pooler_embed=true)
if [ -e "$out/annotations/train.json" ]; then
  tuned single finetune_retrieval "${single[@]}"
  tested single "$out/single" held_out
  tuned temporal finetune_retrieval "${temporal[@]}"
  tested temporal "$out/temporal" held_out
fi
if [ -s "$out/annotations/questions" ]; then
  step answers python -m sharding.answers "$out/shards/every" --output "$out/answers.json"
  asked=(task=qa epoch_unit=questions "answer_list=$out/answers.json")
  tuned single_qa finetune_qa "${asked[@]}" "${single[@]}"
  tested single_qa "$out/single_qa" held_out "${asked[@]}"
  tuned temporal_qa finetune_qa "${asked[@]}" "${temporal[@]}"
  tested temporal_qa "$out/temporal_qa" held_out "${asked[@]}"
fi
python "$launch/study_clips.py" table "$out"
finished "$out/study.md $out/study.png"
