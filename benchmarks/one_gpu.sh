#!/usr/bin/env bash
# Everything that the tables of one GPU come from, part by part: benchmarks/one_gpu.sh [FOLDER]
# Results are JSON lines in FOLDER/results.jsonl, written as they come; each part has a time limit and fails alone. About twenty minutes on an H100.
# SMOKE=1 runs the same parts with small sizes on a CPU. PYTHON chooses the interpreter; PARTS a subset, in this order:
#   facts tests step quickstart engine pipeline curve memory draft
# TARGET is SmolLM2-135M-Instruct (examples/hf-quickstart/prepare_target.py makes it); TRAIN and VALIDATE are conversations for the part draft.
set -u
cd "$(dirname "$0")/.."
out=${1:-outputs/one_gpu}
python=${PYTHON:-.venv/bin/python}
parts=${PARTS:-facts tests step quickstart engine pipeline curve memory draft}
target=${TARGET:-outputs/quickstart/target}
train=${TRAIN:-examples/hf-quickstart/data/train.jsonl}
validate=${VALIDATE:-examples/hf-quickstart/data/validate.jsonl}
store=${STORE:-mooncake}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline
mkdir -p "$out"
out=$(cd "$out" && pwd)

part() { # part NAME SECONDS COMMAND...: run, keep JSON lines, say how long it took
  local name=$1 limit=$2 began=$SECONDS code
  shift 2
  timeout -k 10 "$limit" "$@" >"$out/$name.out" 2>"$out/$name.err"
  code=$?
  grep '^{' "$out/$name.out" | tee -a "$out/results.jsonl"
  echo "{\"done\": \"$name\", \"exit_code\": $code, \"seconds\": $((SECONDS - began))}" | tee -a "$out/results.jsonl"
  [ "$code" = 0 ] || tail -n 25 "$out/$name.out" "$out/$name.err"
}
has() { case " $parts " in *" $1 "*) ;; *) return 1 ;; esac }

if [ -n "${SMOKE:-}" ]; then
  device=cpu accelerator=cpu
  sizes="--hidden 64 --intermediate 128 --heads 2 --kv_heads 1 --head_dim 32 --unroll_steps 3 --vocab 512 --dtype fp32"
  tests="tests/data/test_device_prefetch.py tests/models/test_cuda.py"
else
  device=cuda:0 accelerator=gpu sizes=""
  tests="tests/models/kernel_grid.py tests/models/test_cuda.py tests/data/test_device_prefetch.py tests/transfer/test_cuda.py"
fi
step() { # step NAME SECONDS ARGUMENTS...
  part "$1" "$2" "$python" benchmarks/train_step.py $sizes "${@:3}"
}
fit() { # fit NAME SECONDS ARGUMENTS...: a run's figures
  part "$1" "$2" "$python" main.py fit "${@:3}" --trainer.accelerator "$accelerator" --trainer.default_root_dir "$out/$1" --data.target.path "$target"
  [ -f "$out/$1/pipeline.json" ] && tr -d '\n' <"$out/$1/pipeline.json" | sed 's/ \{2,\}/ /g;s/$/\n/' | tee -a "$out/results.jsonl"
  [ -f "$out/$1/acceptance.jsonl" ] && tail -n 1 "$out/$1/acceptance.jsonl" | tee -a "$out/results.jsonl"
}

has facts && part facts 60 "$python" -c '
import json, torch, lightning, transformers
say = {"torch": torch.__version__, "lightning": lightning.__version__, "transformers": transformers.__version__}
print(json.dumps(say | {"devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}))'
spread=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 8") # Triton compiles most of the time
has tests && part tests 300 "$python" -m pytest -q -p no:cacheprovider $spread $tests
if has step; then
  if [ -n "${SMOKE:-}" ]; then
    step step 120 --tokens 64 --draft_vocab 128 512 --steps 2 --warm 1
  else
    step step 90 --tokens 4096 --draft_vocab 32000 151936 --profile 60
    step fp8 60 --tokens 4096 --draft_vocab 32000 --matmul fp8 --profile 60
    step fp8_all 60 --tokens 4096 --draft_vocab 32000 --matmul fp8_all --profile 60
    step packed 60 --tokens 8192 --lengths lognormal --draft_vocab 32000
    step short 60 --tokens 512 --draft_vocab 32000
  fi
fi
has quickstart && fit quickstart 240 --config configs/quickstart.yaml --data.store.kind "$store" ${SMOKE:+--trainer.max_steps 4 --data.max_tokens 512}
if has engine; then
  if [ -n "${SMOKE:-}" ]; then
    part engine 200 "$python" benchmarks/engine_parity.py --target "$target" --samples 6 --longest 100 --batch_tokens 64 --repeat 2
  else
    part engine 240 "$python" benchmarks/engine_parity.py --target "$target" --device "$device" --store "$store" --batch_tokens 8192 --longest 2000 --more 3000 --file_connector \
      --engine_args "${ENGINE_ARGS:-{\}}"
  fi
fi
if has pipeline; then
  if [ -n "${SMOKE:-}" ]; then
    part pipeline 200 "$python" benchmarks/pipeline.py --hidden 64 --intermediate 128 --heads 2 --kv_heads 1 --head_dim 32 --vocab 512 --draft_vocab 128 --unroll_steps 2 \
      --layers 8 --max_tokens 256 --max_length 128 --median 60 --budget 64MiB --steps 6 --warm 2
  else
    part pipeline 200 "$python" benchmarks/pipeline.py --stores shm mooncake --sources 2
  fi
fi
if has curve; then
  part states 60 "$python" benchmarks/loss_curve.py --save "$out/states.safetensors" --target "$target" --data "$train" ${SMOKE:+--tokens 512 --length 128}
  part curve 180 "$python" benchmarks/loss_curve.py --states "$out/states.safetensors" --exact --fp8 ${SMOKE:+--steps 3 --unroll_steps 2 --draft_vocab 512}
  rm -f "$out/states.safetensors"
fi
if has memory && [ -z "${SMOKE:-}" ]; then
  step memory 60 --tokens 65536 --draft_vocab 32000 --steps 1 --warm 1
  export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True # the last GiB are lost to fragments otherwise
  step recompute 90 --tokens 131072 --draft_vocab 32000 --recompute --steps 1 --warm 1
fi
if has draft; then
  given="--config configs/smollm2_h100.yaml --data.train $train --data.validate $validate"
  part extract 200 "$python" main.py extract $given --data.target.path "$target" --output "$out/records" ${SMOKE:+--data.engines.batch_tokens 2048}
  fit draft 330 $given --data.engine replay --data.records "$out/records" ${SMOKE:+--trainer.max_steps 3 --data.max_tokens 512 --data.max_length 512}
  rm -rf "$out/records"
fi
