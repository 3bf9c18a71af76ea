#!/usr/bin/env bash
# Your own images, 40 labels, from scratch at 32 pixels: no GPU, no download, minutes on two CPU cores. Needs
# --data-path. With so few steps the labels do most of the work: compare with --method supervised --name NAME,
# and give --total-steps 3000 or more where there is time.
python main.py --dataset folder --num-labeled 40 --resize 32 --model wrn-10-2 --amp --channels-last \
    --method mpl --total-steps 400 --eval-step 100 --batch-size 16 --mu 4 \
    --teacher-lr 0.05 --student-lr 0.05 --nesterov --weight-decay 5e-4 --warmup-steps 50 --ema 0.98 \
    --label-smoothing 0.1 --labeled-view strong --randaug 2 8 --temperature 0.7 --threshold 0.8 --lambda-u 1 \
    --uda-steps 200 --finetune-epochs 30 --finetune-lr 0.003 "$@"
