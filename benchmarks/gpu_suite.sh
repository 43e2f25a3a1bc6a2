#!/usr/bin/env bash
# All that needs a GPU, in parts of less than ten minutes each, without a network.
#
#   bash benchmarks/gpu_suite.sh            the names of the parts
#   bash benchmarks/gpu_suite.sh kernel     one part, or several
#
# It runs from the checkout, with PYTHON (python3 by default) that has torch, Triton, pytest, and
# what setup.cfg names for the package and for its bench extra; the parts with fp8 in their names
# also need torchao, and a GPU of compute capability 8.9. The first part that fails, times out or
# skips a test ends it with a status other than 0. Results: benchmarks/results/<gpu>/<part>.json.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
few="arms=cfg,cond,fast,slow"
one="arms=cfg,cond,cfg-half,interval,last-gap,fast,fast-quarter,fast-half,slow"
zigs="arms=cfg,zigzag,zcore,online"
bars="arms=cfg,fast,slow"
graphs="stacks=compile,compile+graphs"
fp8="stacks=compile+graphs,compile+graphs+fp8"

# Steps are cut where a run of the model's own number would not fit into the time: what is compared
# is arms of the same stack, and a step costs the same in a short run.
declare -A speed=(
  [sdxl-eager]="model=sdxl batch_sizes=1 stacks=eager $one seconds=10"
  [sdxl-graphs]="model=sdxl batch_sizes=1 $graphs $one seconds=10"
  [sdxl-zigzag]="model=sdxl batch_sizes=1 steps=20 stacks=eager,compile,compile+graphs $zigs seconds=5"
  [sdxl-bars]="model=sdxl batch_sizes=1 $graphs $bars"
  [sdxl-mlperf]="model=sdxl batch_sizes=1 steps=20 guidance_scale=8 $graphs $bars"
  [sdxl-fp8]="model=sdxl batch_sizes=1 steps=20 $fp8 $few"
  [sdxl-b4]="model=sdxl batch_sizes=4 steps=20 $graphs $few seconds=10"
  [sd35-eager]="model=sd35-large batch_sizes=1 steps=14 stacks=eager $one seconds=10"
  [sd35-graphs]="model=sd35-large batch_sizes=1 $graphs $few seconds=10"
  [sd35-zigzag]="model=sd35-large batch_sizes=1 steps=8 stacks=eager,compile,compile+graphs $zigs seconds=5"
  [sd35-bars]="model=sd35-large batch_sizes=1 steps=20 $graphs $bars"
  [sd35-fp8]="model=sd35-large batch_sizes=1 steps=14 $fp8 $few seconds=10"
  [sd35-b4]="model=sd35-large batch_sizes=4 steps=8 $graphs $few seconds=10"
  [flux-eager]="model=flux-dev batch_sizes=1 steps=10 stacks=eager $one seconds=10"
  [flux-graphs]="model=flux-dev batch_sizes=1 steps=10 $graphs $few seconds=10"
  [flux-zigzag]="model=flux-dev batch_sizes=1 steps=4 stacks=eager,compile,compile+graphs $zigs seconds=5"
  [flux-bars]="model=flux-dev batch_sizes=1 steps=14 $graphs $bars"
  [flux-fp8]="model=flux-dev batch_sizes=1 steps=8 $fp8 $few seconds=10"
  [flux-b4]="model=flux-dev batch_sizes=4 steps=4 $graphs $few seconds=10"
)
declare -A tests=(
  [kernel]="tests/unit/test_fused_step.py"
  [graphs]="tests/gpu/test_cuda_graphs.py tests/gpu/test_fused_more.py"
  [fp8]="tests/gpu/test_float8.py"
)
parts=(kernel graphs)
for model in sdxl sd35 flux; do
  parts+=("$model-bars" "$model-eager" "$model-graphs" "$model-b4" "$model-zigzag")
done
parts+=(sdxl-mlperf fp8 sdxl-fp8 sd35-fp8 flux-fp8)

if [ $# -eq 0 ]; then
  printf '%s\n' "${parts[@]}"
  exit
fi

for part in "$@"; do
  if [[ " ${parts[*]} " != *" $part "* ]]; then
    echo "unknown part: got $part; choose of: ${parts[*]}" >&2
    exit 2
  fi
done

gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-"))')
out="benchmarks/results/$gpu"
mkdir -p "$out"

run_tests() {
  local status=0
  rm -f "$out/$1.xml"
  # shellcheck disable=SC2086 # several files
  timeout 580 "$python" -m pytest -q -rs -p no:cacheprovider --junitxml="$out/$1.xml" \
    ${tests[$1]} || status=$?
  if [ ! -f "$out/$1.xml" ]; then # killed: pytest writes it at its end
    echo "$1: no results, status $status" >&2
    return 1
  fi
  "$python" - "$out/$1" <<'PYTHON'
import json
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

from core2_sampler.benchmarks.report import provenance

out = Path(sys.argv[1])
suite = xml.parse(out.with_suffix(".xml")).getroot().find("testsuite")
counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
failed = [
    f"{case.get('classname')}::{case.get('name')}"
    for case in suite.iter("testcase")
    if case.find("failure") is not None or case.find("error") is not None
]
result = {"when": suite.get("timestamp"), **counts, "failed": failed}
text = json.dumps(result | {"provenance": provenance("cuda")}, indent=1)
out.with_suffix(".json").write_text(text + "\n")
out.with_suffix(".xml").unlink()
print(json.dumps(result))
if counts["skipped"] or not counts["tests"]:
    sys.exit("a GPU was to run every test, but some were skipped, or there are none")
PYTHON
  return "$status"
}

for part in "$@"; do
  if [ -n "${tests[$part]:-}" ]; then
    run_tests "$part"
  else
    TORCHINDUCTOR_CACHE_DIR=$(mktemp -d) # first runs tell what compiling from nothing takes
    export TORCHINDUCTOR_CACHE_DIR
    # shellcheck disable=SC2086 # several options
    timeout 590 "$python" -m core2_sampler.benchmarks.speed ${speed[$part]} out="$out/$part.json"
    rm -rf "$TORCHINDUCTOR_CACHE_DIR"
  fi
done
