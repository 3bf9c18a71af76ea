#!/usr/bin/env bash
# CIFAR-100 with 10,000 labels: Semi-Supervised Learning with Meta-Gradient (Zhang et al., AISTATS 2021). The flags are
# the command in the README of its code, with mixup (ConvLarge, 400,000 steps; published error 30.74 %), and the code's
# defaults: 128 labelled and 128 unlabelled images a step, momentum 0.9, the ramp of the weight, batch norm, the central
# difference, no moving average. This project's choice: --amp, --channels-last, --eval-step, no weight decay on batch
# norm, grey instead of black borders, dropout of single activations instead of whole channels, and labelled images
# that are also unlabelled images.
# Not yet run to the end.
root=$(cd "$(dirname "$0")/.." && pwd)
exec python "$root/main.py" --name semimeta-cifar100-10k --dataset cifar100 --num-labeled 10000 --model convlarge --amp \
    --channels-last --method semimeta --total-steps 400000 --eval-step 1000 --batch-size 128 --mu 1 \
    --student-lr 0.1 --weight-decay 1e-4 --ema 0 --bn-momentum 0.1 --bn-eps 1e-5 \
    --warmup-steps 4000 --schedule milestones --milestones 300000 350000 \
    --mixup-alpha 1 --lambda-u 1 --uda-steps 4000 --feedback-jvp difference --finetune-epochs 0 "$@"
