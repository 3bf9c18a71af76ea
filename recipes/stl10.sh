#!/usr/bin/env bash
# STL-10 with 1,000 of its 5,000 labels and its 100,000 unlabelled images at 96 pixels: the CIFAR-10 recipe with
# WRN-37-2, the network of USB's tables. No result of Meta Pseudo Labels is published. The best result of another
# method is 94.23 % (FlexMatch), which learned from copies of test images, too (--keep-test-copies). Not yet run to
# the end.
root=$(cd "$(dirname "$0")/.." && pwd)
exec bash "$root/run_cifar10.sh" --name stl10-1k --dataset stl10 --num-labeled 1000 --model wrn-37-2 \
    --finetune-epochs 2500 "$@"
