#!/usr/bin/env bash
# 40 labels of 1,297 handwritten digits, in about a minute on two CPU cores.
python main.py --name digits --dataset digits --num-labeled 40 --model wrn-10-1 --channels-last \
    --method mpl --total-steps 900 --eval-step 300 --batch-size 16 --mu 7 \
    --teacher-lr 0.05 --student-lr 0.05 --nesterov --weight-decay 5e-4 --warmup-steps 50 --ema 0.99 \
    --label-smoothing 0.1 --randaug 2 8 --temperature 0.7 --threshold 0.6 --lambda-u 8 --uda-steps 200 \
    --finetune-epochs 50 "$@"
