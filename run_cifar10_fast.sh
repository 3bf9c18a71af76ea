#!/usr/bin/env bash
# CIFAR-10 with 4,000 labels in minutes: a small network with a whitened input, UDA and Muon. One dial, --total-steps: the warm-up, the
# ramp of the UDA loss and the evaluations are fractions of it. A step costs 0.00008 PFLOP (10¹⁵ operations).
#     bash run_cifar10_fast.sh                                             # 0.1 PFLOP: 82.2 % (2 seeds), half an hour of one CPU core
#     bash run_cifar10_fast.sh --method supervised --name labels-only      # 0.016 PFLOP: 80.2 % (2 seeds), five minutes
#     bash run_cifar10_fast.sh --total-steps 260                           # a look: 0.02 PFLOP, 67 % on validation images, 7 minutes
# Any flag can be overridden: bash run_cifar10_fast.sh --seed 1 --method mpl --pseudo-label-view strong
exec python "$(dirname "$0")/main.py" --name cifar10-fast --dataset cifar10 --num-labeled 4000 --model fastcnn-32-128-128 --channels-last \
    --method uda --weak-pass apart --total-steps 1250 --eval-step 0.2 --log-step 0.02 --batch-size 64 --mu 4 \
    --optimizer muon --momentum 0.6 --student-lr 0.1 --teacher-lr 0.1 --schedule linear --warmup-steps 0.1 --ema 0.98 --bn-momentum 0.4 \
    --label-smoothing 0.1 --randaug 1 8 --lambda-u 2 --uda-steps 0.5 --finetune-epochs 0 "$@"
