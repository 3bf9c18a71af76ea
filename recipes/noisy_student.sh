#!/usr/bin/env bash
# Noisy Student (Xie, Luong, Hovy, Le, CVPR 2020) on CIFAR-10 with 4,000 labels. Round 0 learns from the labels. Then
# follow --rounds rounds (default: 3): a student learns, under noise, the soft labels of the last round's network and is
# finetuned on the labelled images. The same command continues after a stop. Any flag can be overridden:
#   bash recipes/noisy_student.sh --rounds 2 --name mine --student-model wrn-28-4 --seed 1
# Round K is the run NAME-K. As published (for ImageNet): soft labels, a student no smaller than its teacher, three
# rounds, RandAugment 2 27, dropout 0.5. This project's choice: network, steps, rates and batches (close to
# run_cifar10.sh), labelled images in finetuning instead of each batch, no stochastic depth, all unlabelled images used.
# Not yet run to the end.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
name=noisy-student rounds=3 folder=checkpoint others=(--resume auto)
while [ $# -gt 0 ]; do
    case $1 in
    --name=* | --rounds=* | --save-path=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        ;;
    --name | --rounds | --save-path)
        [ $# -gt 1 ] || { echo "recipes/noisy_student.sh: $1 needs a value" >&2; exit 2; }
        case $1 in --name) name=$2 ;; --rounds) rounds=$2 ;; *) folder=$2 ;; esac
        shift 2
        ;;
    *)
        others+=("$1")
        shift
        ;;
    esac
done
[[ $rounds =~ ^[0-9]+$ ]] || { echo "recipes/noisy_student.sh: --rounds takes a whole number, not '$rounds'" >&2; exit 2; }

for round in $(seq 0 "$rounds"); do
    if [ -f "$folder/$name-$((round + 1))_last.pth.tar" ]; then
        continue # the next round has begun: this one is finished
    fi
    method=(--method supervised --labeled-view strong --finetune-epochs 0)
    if [ "$round" -gt 0 ]; then
        teacher=$folder/$name-$((round - 1))_finetune_best.pth.tar
        [ -f "$teacher" ] || teacher=$folder/$name-$((round - 1))_best.pth.tar
        method=(--method pseudo-label --teacher-checkpoint "$teacher" --pseudo-label soft --mu 7)
        method+=(--finetune-epochs 625 --finetune-batch-size 512 --finetune-lr 3e-5)
    fi
    trap 'kill -TERM "$run"' TERM
    trap : INT # it reaches the run, too
    python "$root/main.py" --dataset cifar10 --num-labeled 4000 --model wrn-28-2 --amp --channels-last \
        --total-steps 100000 --eval-step 1000 --batch-size 128 --student-lr 0.05 --nesterov --weight-decay 5e-4 \
        --ema 0.995 --warmup-steps 5000 --randaug 2 27 --student-dropout 0.5 \
        "${method[@]}" --name "$name-$round" --save-path "$folder" "${others[@]}" &
    run=$!
    while :; do
        status=0
        wait "$run" || status=$?
        kill -0 "$run" 2> /dev/null || break # else a signal has ended the wait, not yet the run, which saves
    done
    [ "$status" = 0 ] || exit "$status"
done
