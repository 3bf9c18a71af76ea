#!/usr/bin/env bash
# Your own images, 40 labels, from scratch at 32 pixels: no GPU, no download, minutes on two CPU cores. Needs
# --data-path. It trains a single network with UDA, because in so few steps a student does not catch up with its
# teacher. Most of the accuracy comes from the labels (docs/log.md). If you have an hour or more, add
# --method mpl --total-steps 10000.
root=$(cd "$(dirname "$0")/.." && pwd)
exec python "$root/main.py" --dataset folder --num-labeled 40 --resize 32 --model wrn-10-2 --amp --channels-last \
    --method uda --total-steps 600 --eval-step 200 --batch-size 16 --mu 4 --student-lr 0.05 --nesterov \
    --weight-decay 5e-4 --warmup-steps 50 --ema 0.98 --label-smoothing 0.1 --labeled-view strong --randaug 2 8 \
    --temperature 0.7 --threshold 0.8 --lambda-u 1 --uda-steps 200 --finetune-epochs 30 --finetune-lr 0.003 "$@"
