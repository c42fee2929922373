#!/usr/bin/env bash
# The whole path on generated animals, on a CPU: what `semmae demo` does, by its single commands.
#
#   recipes/semmae_tiny_cpu.sh [WORK]
#
# Hours: 0.25 on two cores.  Expect: k-NN top-1 of about 26 among twelve species (docs/log.md, "The
# demo by rounds").  What the README tells of parts takes the defaults of learn-parts, which learn
# three times as long.
set -euo pipefail
work=${1:-work}
semmae data make-creatures --output "$work/creatures" --train 2400 --val 600 --seed 1
semmae stage1 learn-parts --data "$work/creatures/images" --output "$work/learner" \
    --encoder "$(dirname "$0")/../stages/creature_encoder.safetensors" --loader-workers 1 \
    --epochs 4 --place-images 2000 --place-steps 1200 --round-steps 1200 --seed 1
semmae stage1 extract-parts --data "$work/creatures/images" --learner "$work/learner" \
    --output "$work/parts" --workers 2
semmae stage2 pretrain --data "$work/creatures/images" --parts "$work/parts" \
    --output "$work/semmae" --masking semantic --size micro --patch-size 8 --image-size 96 \
    --epochs 8 --batch-size 64 --base-learning-rate 2e-3 --warmup-epochs 2 --loader-workers 1 \
    --checkpoint-epochs 2 --seed 1
semmae eval knn --data "$work/creatures/images" --checkpoint "$work/semmae" \
    --output "$work/results"
