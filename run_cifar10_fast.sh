#!/usr/bin/env bash
# CIFAR-10 with 4,000 labels at a fraction of the price: a small network with whitened inputs, UDA, and one dial, --total-steps, of
# which warm-up, ramp and evaluations are fractions. A step costs 0.000114 PFLOP.
#     bash run_cifar10_fast.sh --total-steps 260      # a look: 0.03 PFLOP
# Any flag can be overridden: bash run_cifar10_fast.sh --seed 1 --method mpl
exec python "$(dirname "$0")/main.py" --name cifar10-fast --dataset cifar10 --num-labeled 4000 --model fastcnn-32-128-128 --channels-last \
    --method uda --weak-pass apart --total-steps 4400 --eval-step 0.1 --log-step 0.01 --batch-size 64 --mu 4 \
    --student-lr 0.1 --teacher-lr 0.1 --nesterov --schedule linear --warmup-steps 0.1 --ema 0.98 --bn-momentum 0.4 --label-smoothing 0.1 \
    --randaug 1 8 --uda-steps 0.2 --finetune-epochs 0 "$@"
