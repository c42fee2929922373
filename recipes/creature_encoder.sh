#!/usr/bin/env bash
# The encoder that `semmae demo` starts from, on 12,000 generated animals (seed 0): plain MAE, then
# prediction of the appearance of recoloured patches.
#
# Makes stages/creature_encoder.safetensors, a micro ViT (128 wide, 6 deep, patch 8, 96 px), in
# float16 to keep it under 3 MB.  Each course starts the learning rate anew.  About 40, 45, 125 and
# 85 minutes on two CPU cores.  The demo's own images come from another seed.  Expect a labelled
# probe of FG-NMI 39 (docs/log.md).
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-work}
semmae data make-creatures --output "$work/creatures" --train 12000 --val 1000 --seed 0
semmae stage2 pretrain --data "$work/creatures/images" --masking random \
    --output "$work/creature-mae" --size micro --patch-size 8 --image-size 96 \
    --epochs 20 --batch-size 128 --base-learning-rate 1.5e-3 --warmup-epochs 1 \
    --loader-workers 1 --checkpoint-epochs 2 --crop-scale 0.4
semmae stage1 learn-encoder --data "$work/creatures/images" --start "$work/creature-mae" \
    --output "$work/creature-encoder" --size micro --patch-size 8 --image-size 96 \
    --epochs 13 --batch-size 32 --base-learning-rate 1.2e-2 --loader-workers 1
semmae stage1 learn-encoder --data "$work/creatures/images" --start "$work/creature-encoder" \
    --output "$work/creature-encoder-2" --size micro --patch-size 8 --image-size 96 \
    --epochs 36 --batch-size 32 --base-learning-rate 1.0e-2 --loader-workers 1
semmae stage1 learn-encoder --data "$work/creatures/images" --start "$work/creature-encoder-2" \
    --output "$work/creature-encoder-3" --size micro --patch-size 8 --image-size 96 \
    --epochs 26 --batch-size 32 --base-learning-rate 1.0e-2 --loader-workers 1
python - "$work/creature-encoder-3" stages/creature_encoder.safetensors <<'PYTHON'
import sys
from pathlib import Path

from semmae.stages.networks import open_encoder, save_encoder

save_encoder(open_encoder(sys.argv[1]).half(), Path(sys.argv[2]))
PYTHON
