#!/usr/bin/env bash
# Everything that needs a GPU, in one go from a bare checkout: compile the kernels, test them, measure them.
#
#   benchmarks/gpu_check.sh                             # under 9 minutes; results in benchmarks/results/gpu_check/
#   GPU_CHECK_SECONDS=3600 OUT=folder benchmarks/gpu_check.sh         # with time for the whole benchmark
#
# It needs Python >= 3.11 with torch, einops, safetensors, numpy, pytest, hypothesis and matplotlib, and no network; nothing
# is installed outside a temporary folder. scikit-build-core, cmake, ninja and a C++ compiler build the CPU kernels;
# without them the tests run on the pure torch form beside the CUDA kernels. PYTHON names another interpreter.
#
# The peers that are measured beside may be carried as wheels in .whl/ (1.1 MiB, pure Python; torch, triton and, for the
# warp kernel of accelerated-scan, nvcc and ninja must be there):
#
#   pip download --no-deps -d .whl fla-core==0.6.0 accelerated-scan==0.3.1
#
# The tests of lra need its extra as well (datasets, jsonargparse and what these need, lightning, rich); without it they
# are left out. `lra sweep gpu-short` is a job of its own: docs/lra.md.
#
# A copied tree has no history: LINRNN_COMMIT=$(git describe --always) puts the commit into the tables.
#
# Each step runs whatever became of the others, within its own time limit. $OUT receives at most 8 files: summary.txt,
# logs.tar.gz (with the table of decoding), the tables of the scan (quick, whole, sweep) and of the layer, and two plots. Exit code: 0 all passed,
# 1 something did not, 2 there is no GPU (then the steps that need none have run: see the summary).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results/gpu_check}
limit=${GPU_CHECK_SECONDS:-530}
work=$(mktemp -d)
site=$work/site logs=$work/logs background=
mkdir -p "$out" "$site" "$logs"
trap '[ -n "$background" ] && kill -- -"$background" 2>/dev/null; rm -rf "$work"' EXIT
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export LINRNN_CACHE_DIR=$work/cubins TORCH_EXTENSIONS_DIR=$work/extensions TRITON_CACHE_DIR=$work/triton
export TORCHINDUCTOR_CACHE_DIR=$work/inductor OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
order=() failed=0
declare -A outcome pattern

left() { echo $((limit - SECONDS)); }

# step NAME SECONDS PATTERN COMMAND...: runs it, at most so long; lines that match go into the summary
step() {
  local name=$1 cap=$2 began=$SECONDS code
  pattern[$name]=$3
  shift 3
  order+=("$name")
  [ "$cap" -gt "$(left)" ] && cap=$(left)
  if [ "$cap" -lt 5 ]; then
    outcome[$name]="not run: no time was left"
    failed=1
    return 1
  fi
  echo "== $name (at most $cap s)"
  timeout -k 5 "$cap" "$@" >"$logs/$name.log" 2>&1
  code=$?
  case $code in
    0) outcome[$name]="ok, $((SECONDS - began)) s" ;;
    124 | 137) outcome[$name]="STOPPED after $cap s" ;;
    *) outcome[$name]="FAILED with code $code after $((SECONDS - began)) s" ;;
  esac
  [ $code -ne 0 ] && failed=1
  echo "   ${outcome[$name]}"
  return $code
}

# Makes this checkout importable: as it is installed, or built into the temporary folder, or by links to its folders.
install_linrnn() {
  if ls .whl/*.whl >/dev/null 2>&1; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl && ls "$site"
  fi
  local here='import linrnn, os, sys; sys.exit(os.path.dirname(os.path.realpath(linrnn.__file__)) != os.path.realpath("linrnn"))'
  if "$python" -P -c "$here" 2>/dev/null; then
    echo "linrnn is installed from this checkout"
  elif "$python" -m pip install -q --no-index --no-deps --no-build-isolation --no-compile \
    -C build-dir="$work/build" --target "$site" .; then
    echo "linrnn is built, with its CPU kernels"
  else
    echo "linrnn could not be built: linked, without its CPU kernels"
    rm -rf "$site/linrnn" "$site/lra" && mkdir "$site/linrnn" "$site/lra"
    ln -s "$PWD"/linrnn/* "$site/linrnn/" && ln -s "$PWD/kernels" "$site/linrnn/kernels"
    ln -s "$PWD"/lra/* "$site/lra/" && ln -s "$PWD/configs" "$site/lra/configs"
  fi
  "$python" -P -c 'import linrnn.kernels, torch; print("linrnn", linrnn.kernels.__path__, "torch", torch.__version__)'
}

facts() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw --format=csv
  nproc && free -g | head -2
  "$python" -P -m linrnn.kernels.cuda
  "$python" -m pip list 2>/dev/null | grep -iE '^(torch|triton|nvidia-cuda-nvrtc|cuda-bindings|numpy|pytest|einops) '
  true
}

sanitize() {
  command -v compute-sanitizer || { echo "compute-sanitizer: not on this machine" && return 0; }
  local tool code=0
  # errors of API calls are none of memory: torch asks the driver what it can do, and "not this" is an answer
  for tool in "memcheck --report-api-errors no" racecheck; do
    echo "-- $tool"
    # shellcheck disable=SC2086
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
      "$python" benchmarks/sanitize.py || code=1
  done
  return $code
}

export -f install_linrnn facts sanitize
export python site work
step install 90 'linrnn' bash -c install_linrnn
pytest=("$python" -P -m pytest -q -p no:cacheprovider -W default -W "error::linrnn.ops.FallbackWarning"
  --continue-on-collection-errors)
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n 6)
verdicts='^[0-9]+.*(passed|failed|collected)|^(FAILED|ERROR)'
goals='^- (met|MISSED|left out|not here)|^Copy|us$|^- first call|Error|error:'

if "$python" -P -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  gpu=1
  # The warp kernel of accelerated-scan takes nvcc about a minute: meanwhile the tests run.
  export TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')
  set -m
  MAX_JOBS=4 "$python" -P -c 'import accelerated_scan.warp' >"$logs/accelerated_scan_warp.log" 2>&1 &
  background=$!
  set +m
  step facts 40 'NVIDIA|kernels run|NVRTC|^torch ' bash -c facts
  step compile 120 'programs in|Error' "$python" benchmarks/compile_kernels.py
  step tests 170 "$verdicts" "${pytest[@]}" "${parallel[@]}" -m "gpu and not slow" tests
  step slow_tests 110 "$verdicts" "${pytest[@]}" -m "gpu and slow" tests
  step scan_quick 150 "$goals" "$python" benchmarks/scan_gpu.py --quick --seconds 100 --out "$out"
  step layer 100 '^\*\*d =|Error|^the ' "$python" benchmarks/layer_gpu.py --out "$out"
  step linear_attention 80 '^## T|^\| (matrix|linear|decay|gated|- )|left out' \
    "$python" benchmarks/linear_attention.py --device cuda --lengths 512 4096 16384 --seconds 0.2 --no-write
  step ssm 70 "$goals|^## |^\| |tokens per second" \
    "$python" benchmarks/ssm.py --device cuda --groups mamba scan training --seconds 0.2 --no-write
  step selective_scan 60 '^\| |^- |wrong|Error' \
    "$python" benchmarks/selective_scan_gpu.py --seconds 40 --out "$work"
  step decode 70 '^\| |^Reading|Error' \
    "$python" benchmarks/decode.py --device cuda --dtype bfloat16 --contexts 1024 65536 --turns 2 --out "$logs"
  step sanitizer 90 '^--|SUMMARY|^=+ (Invalid|Error|Race)|calls|not on' bash -c sanitize
  third=$(($(left) / 3))
  [ "$third" -gt 20 ] && step sweep $((third + 30)) '^\|' \
    "$python" benchmarks/scan_gpu.py --sweep --quick --seconds "$third" --out "$out"
  [ "$(left)" -gt 60 ] && step scan "$(left)" '^- MISSED|^Not reached|Error|error:' \
    "$python" benchmarks/scan_gpu.py --peers quick --seconds $(($(left) - 45)) --out "$out"
else
  gpu=0
  step compile 240 'programs in|Error' "$python" benchmarks/compile_kernels.py --arch sm_80 sm_90 sm_100 \
    --only "A=float LINRNN_X=float LINRNN_V=1 LINRNN_CONSTANT=1"
  step tests 90 "$verdicts" "${pytest[@]}" -m gpu --collect-only tests
  step scan 90 "wrote|Error" "$python" benchmarks/scan_gpu.py --device cpu --dry-run --out "$work"
  step sweep 60 "wrote|Error" "$python" benchmarks/scan_gpu.py --device cpu --dry-run --sweep --out "$work"
  step layer 60 "wrote|Error" "$python" benchmarks/layer_gpu.py --device cpu --dry-run --out "$work"
  step selective_scan 60 "wrote|Error" "$python" benchmarks/selective_scan_gpu.py --device cpu --dry-run --out "$work"
  step decode 90 '^\| |Error' "$python" benchmarks/decode.py --size tiny --contexts 16 --turns 1 --tokens 4 --no-write
  step ssm 120 "^## |Error" "$python" benchmarks/ssm.py --groups scan --size 1 32 16 --seconds 0.01 --no-write
fi

tar -czf "$out/logs.tar.gz" -C "$work" logs
{
  echo "==== gpu_check: $((SECONDS)) s, commit $(git describe --always --dirty 2>/dev/null || echo "${LINRNN_COMMIT:-unknown}")"
  for name in "${order[@]}"; do
    echo "$name: ${outcome[$name]}"
    [ -f "$logs/$name.log" ] && grep -E "${pattern[$name]}" "$logs/$name.log" | tail -n 20 | cut -c1-190 | sed 's/^/    /'
    case ${outcome[$name]} in FAILED*) tail -n 6 "$logs/$name.log" | cut -c1-190 | sed 's/^/    > /' ;; esac
  done
  [ $gpu -eq 0 ] && echo "no GPU: only the steps that need none have run, and nothing was measured"
  echo "files in $out: $(ls "$out" | tr '\n' ' ')"
} 2>/dev/null | tee "$out/summary.txt"
[ $failed -ne 0 ] && exit 1
[ $gpu -eq 0 ] && exit 2
exit 0
