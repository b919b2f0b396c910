#!/usr/bin/env bash
# Trains the second Tiny World on one GPU and packs what came out:
#     recipes/tiny_world/train_on_gpu.sh RUN_FOLDER OUTPUT_FOLDER [flags of python -m recipes.tiny_world.gpu]
# For a machine without a network, `python -m recipes.tiny_world.gpu --carry RUN_FOLDER` makes a RUN_FOLDER of 5 MB
# on another one. Called again, each stage goes on from its newest checkpoint; `--stages unet export` lets only the
# UNet go on, which keeps the latents valid.
# OUTPUT_FOLDER gets the pipeline as base.tar.gz.* in parts of 15 MB (`cat base.tar.gz.* | tar xz`), the log and
# the sheets. A run that is stopped keeps its checkpoints in RUN_FOLDER.
set -euo pipefail
run=$1 output=$2
shift 2
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
mkdir -p "$output"
pack() {
  if [ -d "$run/exported" ]; then
    tar cz -C "$run" exported | split -b 15000000 - "$output/base.tar.gz."
  fi
  for stage in unet decoder_128 autoencoder_128; do
    newest=$(ls "$run/$stage/sheets"/*.png 2>/dev/null | tail -n 1)
    if [ -n "$newest" ]; then cp "$newest" "$output/$stage.png"; fi
  done
}
trap pack EXIT
python3 -m recipes.tiny_world.gpu --run_folder "$run" --export_folder "$run/exported" "$@" 2>&1 |
  tee -a "$output/log.txt"
