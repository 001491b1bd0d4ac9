#!/usr/bin/env bash
# Everything that the first minutes on a GPU should tell, within nine and three quarter minutes, from a plain checkout:
#   OUT=folder bash benchmarks/once.sh
# Leaves two files in $OUT, written anew after every step: log, and results.tgz with a JSON file per step.
#   LIST=1 bash benchmarks/once.sh
# prints the commands and runs none.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

if [ -n "${LIST:-}" ]; then
  R=results
  run() { shift; printf '%q ' "$@"; echo; }
  pack() { :; }
else
  : "${OUT:?error: OUT is not set; give a folder for the results}"
  export PYTHONUNBUFFERED=1
  mkdir -p "$OUT"
  R=$(mktemp -d) CACHE=$(mktemp -d)
  export TRITON_CACHE_DIR=$CACHE/triton TORCHINDUCTOR_CACHE_DIR=$CACHE/inductor # the home folder may not be writable
  exec > >(tee "$OUT/log") 2>&1
  run() {
    local limit=$1
    shift
    echo "== [$SECONDS s] $*"
    timeout "$limit" "$@" || echo "== exit $? of: $*"
  }
  pack() { tar czf "$OUT/results.tgz" -C "$R" .; }
  trap pack EXIT
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.total --format=csv,noheader || echo "== no nvidia-smi"
  "$PYTHON" -c "import torch, triton; print(torch.__version__, triton.__version__, torch.backends.cudnn.version())"
fi
step() { # seconds, module, its words: the limit is what keeps the whole within its time
  local limit=$1 module=$2
  shift 2
  run "$limit" "$PYTHON" -m "benchmarks.$module" "$@"
  pack
}

# 1. Ours against float64 on the timed shapes, side by side (70 s)
for name in attention decode cross_entropy norms vq; do
  command=(80 "$PYTHON" -m "benchmarks.$name" --check --providers ours)
  if [ -n "${LIST:-}" ]; then
    run "${command[@]}"
  else
    run "${command[@]}" > "$R/check-$name.log" 2>&1 &
    checks="${checks:-} $!"
  fi
done
if [ -z "${LIST:-}" ]; then
  wait $checks # not for tee, which ends last
  tail -qn 2 "$R"/check-*.log
  pack
fi
# 2. Configs of the attention kernels, flash and cuDNN beside them (135 s)
step 150 sweep --out "$R/sweep.json" --seconds 135
# 3. Attention against every peer, with the table's rows (130 s)
step 80 attention --preset causal --seconds 3 --repetitions 20 --out "$R/causal-128.json"
step 40 attention --preset causal --shape head_dim=64 --seconds 2 --repetitions 20 --out "$R/causal-64.json" \
  --providers "SDPA flash" "SDPA cuDNN"
step 60 attention --preset packed --seconds 2 --repetitions 20 --out "$R/packed.json" \
  --providers "flash, variable length" "FlexAttention, block mask" "SDPA dense mask, keys repeated"
# 4. What is bound by memory (70 s; nothing that torch.compile would have to start for)
step 30 decode --seconds 1 --providers "SDPA, mask of lengths, heads as queries" --out "$R/decode.json"
step 25 norms --seconds 0.7 --providers torch --out "$R/norms.json"
step 30 cross_entropy --preset plain --seconds 3 --providers "logits, F.cross_entropy" --out "$R/cross_entropy.json"
step 20 vq --preset small --seconds 1 --providers "torch.cdist, argmin" --out "$R/vq.json"
# 5. A training step (60 s)
step 60 train_step --preset packed --seconds 4 --repetitions 8 --out "$R/train_step.json"
[ -n "${LIST:-}" ] || { echo "== done at $SECONDS s"; ls -l "$R"; }
