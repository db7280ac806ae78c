#!/usr/bin/env bash
# Fill a folder with what `gpu_queue.sh` needs on a machine without a network: OUT/1, OUT/2 and OUT/3, one for each call.
#
#   benchmarks/carry.sh [--python 3.12] [--out .carry]
#
# --python: version there (see `python3 -V` on that machine). Each has what everything needs, since a call may find
# another machine, and a part of DALI's wheel; 2 has the other packages of `peers`. DALI's wheels are repacked here:
# without what other Pythons load and in LZMA they are two thirds as large. DALI's decoders of JPEG 2000, TIFF and
# compressed files are libraries of their own, loaded when asked for; they stay here. Takes ten minutes, and ends with
# the sizes: a call takes 64 MiB with the checkout.
set -eu -o pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3} version=3.12 out=$here/../.carry most=$((56 << 20))
while (($#)); do
  case $1 in
    --python) version=$2; shift ;;
    --out) out=$2; shift ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
  esac
  shift
done
[[ ! -e $out/1 ]] || { echo "$out has what an earlier call prepared; say another --out, or remove it"; exit 2; }
mkdir -p "$out"/{1,2,3} "$out/dali"
out=$(cd "$out" && pwd)
needed=(annotated-types pydantic pydantic-core typing-extensions typing-inspection)
peers=(denoising-diffusion-pytorch diffusers ema-pytorch importlib-metadata lazy-importer monai pytorch-fid zipp)
dali=(nvidia-dali-cuda130 nvidia-nvimgcodec-cu13 nvidia-nvjpeg nvtx astunparse gast dm-tree optree makefun six)
platforms=()
for glibc in 35 34 31 28 27 26 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)

download() { # folder, names: the version of the constraints
  local name pin folder=$1
  for name in "${@:2}"; do
    pin=$(grep -m1 "^$name==" "$here/../constraints.txt" || true)
    [[ -n $pin ]] || continue
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
      "${platforms[@]}" -d "$folder" "$pin" || echo "$pin: no wheel for Python $version, left out"
  done
}

download "$out/1" "${needed[@]}"
cp "$out"/1/*.whl "$out/2" && cp "$out"/1/*.whl "$out/3"
download "$out/2" "${peers[@]}"
download "$out/dali" "${dali[@]}"
"$python" - "$out/dali" "${version/./}" <<'PY'
import re, sys, zipfile
from pathlib import Path

other = re.compile(rf"\.cpython-(?!{sys.argv[2]}-)\d+t?-|/include/")
for wheel in Path(sys.argv[1]).glob("nvidia_*.whl"):
    slim = wheel.with_suffix(".slim")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(slim, "w", zipfile.ZIP_LZMA) as new:
        for member in old.infolist():
            if not other.search(member.filename):
                new.writestr(member.filename, old.read(member))
    slim.replace(wheel)
PY
for wheel in "$out"/dali/*.whl; do
  (($(stat -c %s "$wheel") > 30 << 20)) || mv "$wheel" "$out/1"
done
for wheel in "$out"/dali/*.whl; do # the large one, to where there is room
  name=$(basename "$wheel") from=0
  (cd "$out/dali" && sha256sum "$name" >"$out/1/$name.sha256")
  for call in 1 2 3; do
    room=$((most - $(du -sb "$out/$call" | cut -f1)))
    tail -c +$((from + 1)) "$wheel" | head -c "$room" >"$out/$call/$name.part-0$call" || true # tail is cut short
    from=$((from + room))
  done
  ((from >= $(stat -c %s "$wheel"))) || { echo "$name does not fit three calls"; exit 1; }
  rm "$wheel"
done
rmdir "$out/dali"
for call in 1 2 3; do
  size=$(du -sb "$out/$call" | cut -f1)
  echo "call $call: $out/$call, $((size >> 20)) MiB"
  ((size <= 57 << 20)) || { echo "too much for one call: at most 57 MiB beside the checkout"; exit 1; }
done
