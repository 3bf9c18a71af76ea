#!/usr/bin/env bash
# ImageNet with 10 % of the labels: the flags in the README of the published code (ResNet-50, 700,000 steps; published:
# top-1 73.89 %, top-5 91.38 %). It runs on all GPUs of this machine; GPUS=N takes N of them. On 8 GPUs the batch is
# the published batch of 1,024 labelled images; on fewer GPUs, raise --batch-size and --accumulate by the same factor.
# Finetuning takes the published batch of 512 on any number of GPUs. Time: not measured yet.
GPUS=${GPUS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
exec torchrun --standalone --nproc-per-node "$GPUS" \
    "$(dirname "$0")/main.py" --name imagenet-10 --dataset imagenet --data-path data/imagenet --num-labeled 0.1 --model resnet50 \
    --amp --channels-last --sync-bn --workers 8 --method mpl --total-steps 700000 --eval-step 5000 \
    --batch-size 128 --accumulate 8 --mu 15 --teacher-lr 0.6 --student-lr 0.4 --nesterov --weight-decay 1e-4 \
    --ema 0.999 --grad-clip 5 --warmup-steps 5000 --student-wait-steps 20000 --label-smoothing 0.1 \
    --teacher-dropout 0.1 --student-dropout 0.1 \
    --randaug 2 17 --temperature 0.5 --threshold 0.6 --lambda-u 20 --uda-steps 50000 \
    --finetune-epochs 8 --finetune-batch-size $((512 / GPUS)) --finetune-lr 3e-5 "$@"
