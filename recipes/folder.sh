#!/usr/bin/env bash
# Transfer to your own images, 3 % of them labelled. Needs --data-path. A ResNet-18 starts from ImageNet weights and
# trains only its last layer. As in TransferMPL: AdamW, a one-cycle schedule, role-playing and an ensemble of the two
# networks; the views differ from TransferMPL's. To do without the download, give --weights FILE or
# --no-pretrained --no-freeze-body, or run recipes/folder_small.sh. To train the other layers, too, at a lower rate:
# --no-freeze-body --body-lr-scale 0.1.
# Time: not measured yet.
root=$(cd "$(dirname "$0")/.." && pwd)
exec python "$root/main.py" --dataset folder --num-labeled 0.03 --resize 224 --model resnet18 --pretrained \
    --freeze-body --amp --channels-last --method mpl --total-steps 2000 --eval-step 200 --batch-size 16 --mu 4 \
    --optimizer adamw --schedule one-cycle --teacher-lr 1e-3 --student-lr 1e-3 --weight-decay 1e-2 \
    --ema 0.99 --label-smoothing 0.1 --randaug 2 9 --temperature 0.7 --threshold 0.6 --lambda-u 1 --uda-steps 500 \
    --switch-every 200 --ensemble --finetune-epochs 20 --finetune-lr 1e-4 "$@"
