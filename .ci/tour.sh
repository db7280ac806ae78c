#!/usr/bin/env bash
# A short tour of an installed ddpm-lmk as a newcomer takes it: from a folder with a space in its name, without the
# checkout, every command once, on made-up films. Ends with 0 when every exit code and every output is the promised one.
# Use: bash .ci/tour.sh PATH_TO_ddpm-lmk      (a python with the same packages must lie beside it)
set -euo pipefail
lmk=$(realpath -s "${1:?give the path of ddpm-lmk}")
python=$(dirname "$lmk")/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/my films"
cd "$work/my films"
export OMP_NUM_THREADS=1
unset PYTHONPATH

fail() {
  echo "tour: FAILED: $*" >&2
  sed 's/^/    /' log >&2
  exit 1
}

# run CODE WORDS...: `ddpm-lmk WORDS` must end with this exit code and no traceback.
run() {
  local wanted=$1 code=0
  shift
  "$lmk" "$@" > log 2>&1 || code=$?
  [ "$code" = "$wanted" ] || fail "exit code $code, wanted $wanted: ddpm-lmk $*"
  if grep -q Traceback log; then fail "a traceback: ddpm-lmk $*"; fi
  echo "tour: $(date +%T) exit $code: ddpm-lmk $*"
}

# has WORD: the last output must say so.    made FILE...: these must be there, and not empty.
has() { grep -qF -- "$1" log || fail "not said: $1"; }
made() { for file in "$@"; do [ -s "$file" ] || fail "not written: $file"; done; }

"$python" - <<'EOP'
# Twelve films as PNG, and a table of the same with three landmarks each; bright spots mark the points.
from pathlib import Path

import numpy as np
from PIL import Image

Path("films").mkdir()
images, landmarks = ["image_id,file,split,mm_per_pixel"], ["image_id,landmark_index,landmark_name,x,y"]
y, x = np.mgrid[0:96, 0:80]
for film in range(12):
    draw = np.random.default_rng(film)
    points = draw.uniform(20, 60, (3, 2)).round(1)
    grey = 60 + 40 * np.sin(x / 9 + film) * np.cos(y / 7) + draw.normal(0, 4, x.shape)
    for px, py in points:
        grey += 120 * np.exp(-((x - px) ** 2 + (y - py) ** 2) / 18)
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(f"films/film {film}.png")
    images.append(f"f{film},films/film {film}.png,{'train' if film < 8 else 'test'},0.3")
    landmarks += [f"f{film},{i},spot{i},{px},{py}" for i, (px, py) in enumerate(points)]
Path("images.csv").write_text("\n".join(images) + "\n")
Path("landmarks.csv").write_text("\n".join(landmarks) + "\n")
EOP

run 0 --version
PYTHONIOENCODING=ascii run 0 --help
run 0 doctor --out runs
run 0 pretrain --explain train
run 0 init "run files"
made "run files/configs/README.md" "run files/launch/slurm/gpu8.sbatch"
run 7 init "run files"
has "exists and is kept"

run 0 shards pack films --kind folder --size 32 --out shards/pool
run 0 shards pack . --kind table --size 32 --out shards/labelled
run 0 shards pack chest --kind phantom --size 32 --count train=4 --count test=4 --out shards/chests
run 0 shards verify shards/pool
run 0 shards show shards/pool shards/labelled --out look
made look/*.html look/*.png

run 0 pretrain configs/pretrain/base.yaml data.path=shards/pool --dry-run
run 2 pretrain configs/pretrain/bass.yaml data.path=shards/pool
has "did you mean the shipped configs/pretrain/base.yaml"
run 3 pretrain configs/smoke/pretrain.yaml data.path=films --dry-run
has "ddpm-lmk shards pack films --kind folder"
run 0 pretrain "run files/configs/smoke/pretrain.yaml" data.path=shards/pool --cpu 1 --out runs/pretrain
made runs/pretrain/results.json
run 0 finetune configs/smoke/finetune.yaml data.path=shards/labelled init.weights=runs/pretrain --cpu 1 --out runs/finetune
run 0 sweep configs/smoke/sweep.yaml data.path=shards/labelled seeds=[0] --cpu 1 --out runs/sweep
run 0 report runs/sweep --out report.html
made report.html report.csv report.md
run 0 predict runs/finetune films --out found
has "12 predicted, 0 failed"
run 3 predict runs/finetune log --out none
run 4 predict runs/sweep films --out none
has "runs/sweep/cells/scratch-k1-s0"
made found/predictions.csv found/predictions.json "found/overlays/film 9.png"
run 0 evaluate runs/finetune --data shards/labelled --acknowledge-leakage
run 0 export runs/finetune --out weights.safetensors
run 0 sample runs/pretrain --count 2 --steps 3 --out samples.png
made weights.safetensors samples.png
echo "tour: every command did what it promises"
