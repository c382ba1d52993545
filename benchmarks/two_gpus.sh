#!/usr/bin/env bash
# Everything that only two GPUs can show, in about ten minutes: benchmarks/two_gpus.sh [FOLDER]
# Results are JSON lines in FOLDER/results.jsonl, written as they come; each part has a time limit and fails alone.
# SMOKE=1 runs the same parts with small sizes on two CPU processes (gloo). PYTHON chooses the interpreter; PARTS a subset.
set -u
cd "$(dirname "$0")/.."
out=${1:-outputs/two_gpus}
python=${PYTHON:-.venv/bin/python}
parts=${PARTS:-facts target paths scaling engines}
small=${SMOKE:+--small}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$out"
out=$(cd "$out" && pwd)

part() { # part NAME SECONDS COMMAND...: run, keep JSON lines, say how long it took
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  timeout -k 10 "$limit" "$@" 2> >(tee "$out/$name.err" >/dev/null) | grep --line-buffered '^{' | tee -a "$out/results.jsonl"
  code=${PIPESTATUS[0]}
  echo "{\"done\": \"$name\", \"exit_code\": $code, \"seconds\": $((SECONDS - began))}" | tee -a "$out/results.jsonl"
  [ "$code" = 0 ] || tail -n 25 "$out/$name.err"
}
has() { case " $parts " in *" $1 "*) ;; *) return 1 ;; esac }
scale() { # scale NAME SECONDS ARGUMENTS...
  part "$1" "$2" "$python" -m torch.distributed.run --standalone --nproc_per_node 2 benchmarks/scaling.py "${@:3}"
}

if has facts; then
  part facts 60 "$python" -c '
import json, os, torch, lightning, transformers
cuda = torch.cuda.is_available()
say = {"torch": torch.__version__, "lightning": lightning.__version__, "transformers": transformers.__version__}
say |= {"devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}
say |= {"nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None, "peer_access": cuda and torch.cuda.can_device_access_peer(0, 1)}
print(json.dumps(say | {key: value for key, value in os.environ.items() if key.startswith("NCCL_")}))'
fi
if has target; then
  part target 150 "$python" benchmarks/two_gpus.py target "$out/target" $small --layers "${LAYERS:-36}" &
fi
has paths && part paths "${PATHS_LIMIT:-300}" "$python" benchmarks/two_gpus.py paths "$out/paths" $small --jobs "${JOBS:-8}"
wait
if has scaling; then
  if [ -n "${SMOKE:-}" ]; then
    tiny="--hidden 64 --intermediate 128 --heads 2 --kv_heads 1 --head_dim 32 --unroll_steps 3 --vocab 512 --steps 3"
    scale scaling 200 $tiny --tokens 64 128 --draft_vocab 128 512
    scale apart 200 $tiny --strategies ddp fsdp2 --tokens 64 --draft_vocab 128 --accumulate 2 --profile --stops
  else
    scale scaling 240 --tokens 4096 8192 --draft_vocab 32000 151936 --steps 8 --warm 2
    for strategy in ddp fsdp2; do scale "apart-$strategy" 60 --strategies $strategy --tokens 4096 --draft_vocab 32000 --profile --stops --steps 8; done
  fi
fi
has engines && part engines "${ENGINES_LIMIT:-300}" "$python" benchmarks/two_gpus.py engines "$out/engines" --target "$out/target" $small --store "${STORE:-mooncake}"
if has scaling && [ -z "${SMOKE:-}" ]; then
  scale accumulated 60 --tokens 4096 --draft_vocab 32000 --accumulate 4 --steps 4 --warm 1
fi
rm -rf "$out/target"
