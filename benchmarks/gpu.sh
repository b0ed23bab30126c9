#!/usr/bin/env bash
# make gpu: everything that needs an NVIDIA GPU, in one command of less than eight minutes; what matters most comes first.
# $OUT if set, else benchmarks/results/, gets gpu.log, of all stages, and a JSON of each benchmark, written as it goes.
# Without a GPU it compiles the CUDA sources and stops there, saying so. PYTHON picks the interpreter, GPU_SECONDS the
# time for all stages; no network is used.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export EMBEDDINGS_NATIVE=require PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
results=${OUT:-benchmarks/results}
deadline=${GPU_SECONDS:-470} # from the start; no stage goes on after it
log=$results/gpu.log
mkdir -p "$results"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  if nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "make gpu: nvidia-smi lists a GPU, and torch.cuda.is_available() is false:"
    "$PYTHON" -c 'import torch; print(torch.__version__, torch.version.cuda); torch.cuda.init()' 2>&1 | tail -2
    exit 1
  fi
  "$PYTHON" -c 'from embeddings.native import compile_cuda; raise SystemExit(compile_cuda())' || exit 1
  echo "make gpu: the CUDA sources compile; no GPU here, so nothing was run on one"
  exit 0
fi

# all that is missing at once, before anything is built
"$PYTHON" - <<'CHECK' || exit 1
import importlib, shutil, sys
from pathlib import Path

modules = """
    duckdb hydra hypothesis matplotlib numpy omegaconf packaging plotly pytest safetensors scipy sklearn tensorboard
    torch tqdm xdist yaml
"""
missing = []
for name in modules.split():
    try:
        importlib.import_module(name)
    except Exception as error:
        missing.append(f"{name} ({error})")
beside = Path(sys.executable).parent
missing += [name for name in ("c++", "ninja", "nvcc") if not shutil.which(name) and not (beside / name).exists()]
if missing:
    sys.exit("make gpu: missing here: " + ", ".join(missing))
CHECK

: >"$log"
telling="FAILED|ERROR|Error:|error:|is left out|^cuda graph|^test AUC|^throughput" # of a stage's output
stages=() num_failed=0
# stage NAME SECONDS COMMAND...: runs it for that long at most, into the log; says how it went, and goes on
stage() {
  local name=$1 limit=$2 began=$SECONDS left=$((deadline - SECONDS)) outcome=ok lines
  shift 2
  limit=$((limit < left ? limit : left))
  if ((limit > 0)); then
    echo "== $name, $limit s at most: $*" | tee -a "$log"
    lines=$(wc -l <"$log")
    timeout -s INT -k 10 "$limit" "$@" >>"$log" 2>&1 # interrupted, pytest still says what failed
    case $? in 0) ;; 124 | 137) outcome="timed out" ;; 127) outcome="not installed" ;; *) outcome=failed ;; esac
    tail -n +$((lines + 1)) "$log" | grep -E "$telling" | cut -c -200 | head -15
    tail -n +$((lines + 1)) "$log" | tail -n 2 | cut -c -400
  else
    outcome="no time left"
  fi
  [ "$outcome" = ok ] || num_failed=$((num_failed + 1))
  stages+=("$(printf '%-20s %4d s  %s' "$name" $((SECONDS - began)) "$outcome")")
}

stage build 180 "$PYTHON" -c 'from embeddings import native; native.load("require"); print("built:", native.build())'
if ((num_failed)); then
  cat "$log"
  exit 1
fi
stage cuda-tests 80 env OMP_NUM_THREADS=2 "$PYTHON" -m pytest -vv --tb=short -n 8 --dist worksteal \
  $("$PYTHON" -c 'import pytest_timeout' 2>/dev/null && echo --timeout=60) --continue-on-collection-errors \
  -m "not slow" -k "cuda and not on_host and not test_settings and not test_linear" tests
stage roof 80 "$PYTHON" -m benchmarks.roof --device cuda
stage step 95 "$PYTHON" -m benchmarks.step --device cuda --optimizers sgd --batches 65536,2048 --rounds 3 --seconds 0.1
# the grid as its authors measured it
stage grids 40 "$PYTHON" -m benchmarks.grids --device cuda --grids fast --rows 10,1000,100000 --dims 8,32,128 \
  --batches 32,2048,16384 --seconds 0.05
# a case of each map, combination, rule and kernel: under a sanitizer the whole suite would take hours
one_of_each="every_map_and_combine and (add or mixed) or native_update and hashed and not sign and (float32 or ADAM)"
one_of_each+=" or atomic_errs and (dense or bloom)"
interactions="loop_over_pairs and (3x26x16 or 2x9x33)"
# sanitizer TOOL SECONDS TESTS FILES...: of tests/embeddings
sanitizer() {
  local tool=$1 limit=$2 tests=$3
  shift 3
  stage "$tool" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 3 \
    "$PYTHON" -m pytest -vv --tb=short -k "cuda and native and ($tests)" "${@/#/tests/embeddings/}"
}
sanitizer memcheck 50 "$one_of_each or $interactions" test_bag.py test_fused.py test_gradients.py test_interaction.py
stage lookup 25 "$PYTHON" -m benchmarks.lookup --device cuda --tables kaggle/10 --dims 16,128 --bags 1 \
  --batches 2048,65536 --laws uniform --works forward,sgd,rowwise_adagrad --backends "dense,hashed 0.01 block 16" \
  --seconds 0.2
stage train 30 "$PYTHON" train.py embedding=hashed compression=0.1 device=cuda native=require data_on_device=true
sanitizer racecheck 25 "$interactions" test_interaction.py # of shared memory, which no other kernel of ours has
sanitizer initcheck 25 "native_update and hashed and not sign and (float32 or ADAM) or $interactions" \
  test_fused.py test_interaction.py
stage interaction 15 "$PYTHON" -m benchmarks.interaction --device cuda
stage growth 10 "$PYTHON" -m benchmarks.growth --device cuda --quick

printf '\n%s\n' "make gpu: $num_failed stages of ${#stages[@]} not ok; $log has their output"
printf '  %s\n' "${stages[@]}"
"$PYTHON" -m benchmarks.table "$results"
exit $((num_failed > 0))
