#!/usr/bin/env bash
# Two moons, 6 labels, 2-8-8-2 networks (the paper's Figure 2): half a minute on one CPU core.
root=$(cd "$(dirname "$0")/.." && pwd)
OMP_NUM_THREADS=1 exec python "$root/main.py" --name twomoons --dataset twomoons --num-labeled 6 --model mlp-2-8-8-2 \
    --method mpl --total-steps 6000 --eval-step 1000 --batch-size 6 --mu 34 --jitter 0 0.15 \
    --teacher-lr 0.3 --student-lr 0.3 --nesterov --weight-decay 0 --warmup-steps 800 \
    --temperature 0.3 --threshold 0.9 --lambda-u 8 --uda-steps 1500 --finetune-epochs 0 "$@"
