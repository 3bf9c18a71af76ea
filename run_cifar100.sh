#!/usr/bin/env bash
# CIFAR-100 with 10,000 labels: the CIFAR-10 recipe of the published code with WRN-28-8. The paper gives no result
# for it. Time: not measured yet.
exec python main.py --name cifar100-10k --dataset cifar100 --num-labeled 10000 --model wrn-28-8 --amp --channels-last \
    --method mpl --total-steps 300000 --eval-step 1000 --batch-size 128 --mu 7 \
    --teacher-lr 0.05 --student-lr 0.05 --nesterov --weight-decay 5e-4 --ema 0.995 \
    --warmup-steps 5000 --student-wait-steps 3000 --label-smoothing 0.15 \
    --teacher-dropout 0.2 --student-dropout 0.2 \
    --randaug 2 16 --temperature 0.7 --threshold 0.6 --lambda-u 8 --uda-steps 5000 \
    --finetune-epochs 250 --finetune-batch-size 512 --finetune-lr 3e-5 "$@"
