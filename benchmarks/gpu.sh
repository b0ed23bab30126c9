#!/usr/bin/env bash
# make gpu: everything that needs an NVIDIA GPU, in one command. Results go to $OUT if set, else to benchmarks/results/.
# Without a GPU it compiles the CUDA sources and stops there, saying so. PYTHON picks the interpreter; no network is used.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export EMBEDDINGS_NATIVE=require PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
results=${OUT:-benchmarks/results}
mkdir -p "$results"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  "$PYTHON" -c 'from embeddings.native import compile_cuda; raise SystemExit(compile_cuda())'
  echo "make gpu: the CUDA sources compile; no GPU here, so nothing was run on one"
  exit 0
fi

echo "== build"
"$PYTHON" -c 'from embeddings import native; native.load("require"); print("built:", native.build())'
status=0
echo "== tests on cuda"
"$PYTHON" -m pytest -k cuda tests 2>&1 | tee "$results/cuda-tests.log" || status=1
# every map, combination and pooling, forward and backward; under a sanitizer the whole suite would take hours
kernels="every_map_and_combine or each_kind_of_backend or zero_samples or loop_over_pairs"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    echo "== compute-sanitizer $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 3 "$PYTHON" -m pytest -x -k "cuda and native and ($kernels)" \
      tests/embeddings/test_bag.py tests/embeddings/test_interaction.py >"$results/sanitizer-$tool.log" 2>&1 || status=1
    tail -2 "$results/sanitizer-$tool.log"
  done
else
  echo "== compute-sanitizer: not installed here, skipped"
fi
echo "== benchmarks"
"$PYTHON" -m benchmarks.lookup --device cuda --tables kaggle/10,1e6 --laws uniform --seconds 0.5 || status=1
"$PYTHON" -m benchmarks.growth --device cuda || status=1
# the grid as its authors measured it
"$PYTHON" -m benchmarks.grids --device cuda --rows 10,100,1000,10000,100000,1000000 --dims 8,32,128,256 \
  --batches 32,128,512,2048,8192,16384 --seconds 0.2 || status=1
"$PYTHON" -m benchmarks.interaction --device cuda || status=1
"$PYTHON" train.py embedding=hashed compression=0.1 device=cuda native=require || status=1
exit $status
