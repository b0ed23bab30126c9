#!/usr/bin/env bash
# make gpu: everything that needs an NVIDIA GPU, in one command; each stage has a limit, together nine and a half minutes.
# Results go to $OUT if set, else to benchmarks/results/. Without a GPU it compiles the CUDA sources and stops there, saying so. PYTHON picks the
# interpreter; no network is used.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export EMBEDDINGS_NATIVE=require PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
results=${OUT:-benchmarks/results}
mkdir -p "$results"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  "$PYTHON" -c 'from embeddings.native import compile_cuda; raise SystemExit(compile_cuda())' || exit 1
  echo "make gpu: the CUDA sources compile; no GPU here, so nothing was run on one"
  exit 0
fi

failed=()
# stage NAME SECONDS COMMAND...: runs it for that long at most, into a log; says how it went, and goes on
stage() {
  local name=$1 seconds=$2 began=$SECONDS
  shift 2
  echo "== $name: $*"
  if ! timeout "$seconds" "$@" >"$results/$name.log" 2>&1; then
    failed+=("$name")
    grep -E "^(FAILED|ERROR)|rror:" "$results/$name.log" | head -20
  fi
  tail -2 "$results/$name.log"
  echo "   $((SECONDS - began)) s"
}

stage build 120 "$PYTHON" -c 'from embeddings import native; native.load("require"); print("built:", native.build())'
stage cuda-tests 100 "$PYTHON" -m pytest -q -k "cuda and not on_host" tests
# every map, combination and pooling, forward, backward and update; under a sanitizer the whole suite would take hours
kernels="every_map_and_combine or each_kind_of_backend or zero_samples or loop_over_pairs or native_update"
for tool in memcheck racecheck initcheck; do
  if command -v compute-sanitizer >/dev/null; then
    stage "sanitizer-$tool" 30 compute-sanitizer --tool "$tool" --error-exitcode 3 "$PYTHON" -m pytest -q -x \
      -k "cuda and native and ($kernels)" \
      tests/embeddings/test_bag.py tests/embeddings/test_fused.py tests/embeddings/test_interaction.py
  else
    echo "== compute-sanitizer: not installed here, skipped"
  fi
done
stage lookup 50 "$PYTHON" -m benchmarks.lookup --device cuda --tables kaggle/10,1e7 --dims 16,128 --bags 1,10 \
  --batches 2048,65536 --laws uniform,zipf --seconds 0.2
stage step 120 "$PYTHON" -m benchmarks.step --device cuda --optimizers sgd --batches 2048,65536 --rounds 3 --seconds 0.1
# the grid as its authors measured it
stage grids 25 "$PYTHON" -m benchmarks.grids --device cuda --rows 10,1000,100000 --dims 8,32,128 \
  --batches 32,2048,16384 --seconds 0.05
stage interaction 10 "$PYTHON" -m benchmarks.interaction --device cuda
stage growth 15 "$PYTHON" -m benchmarks.growth --device cuda
stage train 40 "$PYTHON" train.py embedding=hashed compression=0.1 device=cuda native=require data_on_device=true
"$PYTHON" -m benchmarks.table "$results"
echo "make gpu: ${#failed[@]} stages failed${failed:+: ${failed[*]}}; logs and JSON are in $results"
exit $((${#failed[@]} > 0))
