#!/usr/bin/env bash
# SemMAE ViT-S/16, 100 epochs on one GPU: enough to compare mask policies.
#
#   recipes/semmae_small_1gpu.sh DATA PARTS OUTPUT [MASKING]
#
# PARTS is a store that keeps the images, made with `--cache-images 256` (and, for attention masks,
# with `--class-attention`).  MASKING is semantic, or any other of --masking: run each with the same
# seed.
# Hours: 1.4 on one H100 or H200 for ImageNet-1k, by its operations at 40 % of the peak; not measured.
# That asks for 25,000 images a second: 16 processor cores of 0.6 ms an image from the JPEG cache, 6
# from a raw one (--cache-format raw).  With fewer, the time a step waits for data is in the log.
# Expect: no published figure; `semmae eval knn` and `linear` beside the run with --masking random.
set -euo pipefail
semmae stage2 pretrain --data "$1" --parts "$2" --output "$3" --masking "${4:-semantic}" \
    --size small --patch-size 16 --epochs 100 --batch-size 1024 --micro-batch 512 \
    --warmup-epochs 10 --images cache --loader-workers 16
