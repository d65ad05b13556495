# Sourced by the scripts that run a chain of commands (demo.sh, study.sh, study_clips.sh, photos.sh); they set `out`, the
# folder of results.
# Every command is printed before it runs, so that it can be copied. After an interruption, run the chain again: it resumes.
mkdir -p "$out/steps"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false

# Two processes on a CPU, one a GPU where there are any, also such as PyTorch cannot use: the first command says why. A
# separate port, so that two chains can run on one machine.
port=$((20000 + RANDOM % 12000))
has_gpu() {
  [ "${DS_ACCELERATOR:-}" != cpu ] && [[ ! "${CUDA_VISIBLE_DEVICES-0}" =~ ^(-1)?$ ]] &&
    { compgen -G '/dev/nvidia[0-9]*' || nvidia-smi -L | grep GPU; } >/dev/null 2>&1
}
if has_gpu; then
  ds=(deepspeed --master_port "$port")
else
  export DS_ACCELERATOR=cpu
  ds=(deepspeed --num_accelerators 2 --master_port "$port")
fi

step() { # step NAME COMMAND...: print and run it once, however often the chain is started
  local name=$1
  shift
  [ -e "$out/steps/$name" ] && return
  printf '\n\033[1m$ %s\033[0m\n' "$*"
  "$@"
  touch "$out/steps/$name"
}

same_inputs() { # same_inputs WORD...: refuse results of other inputs, whose steps would count as done
  local file=$out/steps/inputs
  [ -e "$file" ] || printf '%s\n' "$*" >"$file"
  [ "$(cat "$file")" = "$*" ] && return
  echo "error: $out has results of other inputs ($(cat "$file")): give another folder for these, or remove it" >&2
  exit 2
}

draw() { # draw IMAGES CLIPS TEST_ITEMS: Shapes
  step shapes python -m sharding.shapes --output "$out/shapes" --images "$1" --clips "$2" --test-items "$3" --size 72
}

pack() { # pack image|video ANNOTATIONS...: into shards, all frames of a clip
  local medium=$1 name
  shift
  for name in "$@"; do
    step "pack_$name" python -m sharding.build --annotations "$out/shapes/$name.json" --media-root "$out/shapes/media" \
      --media-type "$medium" --output "$out/shards/$name" --name "$name" --size 64 --fps 6
  done
}

finished() { # finished WHAT: the last line, with the minutes since the start
  printf '\nDone in %d minutes. %s\n' $(((SECONDS + 59) / 60)) "$1"
}
