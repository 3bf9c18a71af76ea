#!/usr/bin/env bash
# CIFAR-100 with 10,000 labels: the published CIFAR-10 recipe with WRN-28-8. The paper has no result for CIFAR-100.
# Time: not measured yet.
root=$(cd "$(dirname "$0")/.." && pwd)
exec bash "$root/run_cifar10.sh" --name cifar100-10k --dataset cifar100 --num-labeled 10000 --model wrn-28-8 \
    --finetune-epochs 250 "$@"
