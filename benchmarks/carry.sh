#!/usr/bin/env bash
# Fill a folder with what `gpu_queue.sh` needs on a machine without a network, in trips of at most 60 MiB each.
#
#   benchmarks/carry.sh --python 3.12 [--out .carry] [--films DIR] [--dali] [--peers]
#
# --python: version there (see `python3 -V` on that machine). --films: a folder such as isbi2015_ceph (images.csv,
# landmarks.csv), packed here at 256 pixels. --dali and --peers add their wheels; those of DALI (190 MiB) go in parts.
# OUT/trip-1, OUT/trip-2, ... : take one at a time as --carried of gpu_queue.sh; it keeps what earlier trips brought.
set -eu -o pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3} version="" out=$here/../.carry films="" dali=0 peers=0
while (($#)); do
  case $1 in
    --python) version=$2; shift ;;
    --out) out=$2; shift ;;
    --films) films=$2; shift ;;
    --dali) dali=1 ;;
    --peers) peers=1 ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2 ;;
  esac
  shift
done
[[ -n $version ]] || { echo "say which Python is there: --python 3.12"; exit 2; }
[[ ! -e $out/trip-1 ]] || { echo "$out has trips of an earlier call; say another --out, or remove them"; exit 2; }
mkdir -p "$out/all/packs"
names=(annotated-types braceexpand pydantic pydantic-core typing-inspection typing-extensions webdataset)
((peers)) && names+=(denoising-diffusion-pytorch diffusers ema-pytorch importlib-metadata lazy-importer monai pytorch-fid zipp einops scipy)
((dali)) && names+=(nvidia-dali-cuda130 nvidia-libnvcomp-cu13 nvidia-nvimgcodec-cu13 nvidia-nvjpeg nvidia-nvjpeg2k-cu13
  nvidia-nvtiff-cu13 nvtx astunparse gast dm-tree optree makefun)
platforms=()
for glibc in 35 34 31 28 27 26 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)
for name in "${names[@]}"; do
  pin=$(grep -m1 "^$name==" "$here/../constraints.txt" || true)
  [[ -n $pin ]] || continue
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    "${platforms[@]}" -d "$out/all" "$pin" || echo "$pin: no wheel for Python $version, left out"
done
for wheel in "$out"/all/*.whl; do
  if (($(stat -c %s "$wheel") > 50 << 20)); then
    (cd "$out/all" && sha256sum "$(basename "$wheel")" >"$(basename "$wheel").sha256")
    split -b 50m -d "$wheel" "$wheel.part-"
    rm "$wheel"
  fi
done
[[ -z $films ]] || "$python" -m ddpm_lmk.cli shards pack "$films" --kind table --spec cephalometric --size 256 --out "$out/all/packs/isbi256"
trip=1 used=0
for thing in "$out"/all/packs/* "$out"/all/*.whl*; do
  [[ -e $thing ]] || continue
  size=$(du -sk "$thing" | cut -f1)
  ((used && used + size > 60 << 10)) && trip=$((trip + 1)) used=0
  used=$((used + size))
  where=$out/trip-$trip
  [[ $thing == */packs/* ]] && where=$where/packs
  mkdir -p "$where" && mv "$thing" "$where/"
done
rm -r "$out/all"
du -sh "$out"/trip-*
