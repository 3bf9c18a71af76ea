#!/usr/bin/env bash
# STL-10 with 1,000 of its 5,000 labels and its 100,000 unlabelled images at 96 pixels: the flags of the CIFAR-10
# recipe with the network of USB's tables (WRN-37-2). Nothing is published for Meta Pseudo Labels; the best of others
# is 94.23 % (FlexMatch), with copies of test images among the unlabelled ones: --keep-test-copies. Not yet run to the end.
exec python main.py --name stl10-1k --dataset stl10 --num-labeled 1000 --model wrn-37-2 --amp --channels-last \
    --method mpl --total-steps 300000 --eval-step 1000 --batch-size 128 --mu 7 \
    --teacher-lr 0.05 --student-lr 0.05 --nesterov --weight-decay 5e-4 --ema 0.995 \
    --warmup-steps 5000 --student-wait-steps 3000 --label-smoothing 0.15 \
    --teacher-dropout 0.2 --student-dropout 0.2 \
    --randaug 2 16 --temperature 0.7 --threshold 0.6 --lambda-u 8 --uda-steps 5000 \
    --finetune-epochs 2500 --finetune-batch-size 512 --finetune-lr 3e-5 "$@"
