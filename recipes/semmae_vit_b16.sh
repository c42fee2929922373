#!/usr/bin/env bash
# SemMAE ViT-B/16, 800 epochs of ImageNet-1k: the paper's model at patch 16.
#
#   recipes/semmae_vit_b16.sh DATA PARTS OUTPUT [GPUS]
#
# DATA is the folder of ImageNet, PARTS the store that `semmae stage1 extract-parts` made of it.
# Hours: 41 on one H100 or H200 and 5 on eight, by its operations at 40 % of their peak; not measured.
# That asks for 7,000 images a second and GPU: 12 processor cores of 1.7 ms an image, or 5 with
# --images cache --loader-workers 5 (`python -m semmae.benchmarks.loader` measures it on yours).
# Expect: fine-tuned top-1 83.4 (the authors' files: 83.352), linear probe 65.0 (paper, tables 3, 4).
set -euo pipefail
torchrun --standalone --nproc-per-node "${4:-1}" -m semmae stage2 pretrain \
    --data "$1" --parts "$2" --output "$3" --masking semantic --size base --patch-size 16 \
    --epochs 800 --batch-size 4096 --micro-batch 256 --warmup-epochs 40 --gamma 2 \
    --keep-every 100 --loader-workers 12
