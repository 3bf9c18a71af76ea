#!/usr/bin/env bash
# Measurements on a GPU, in calls of at most ten minutes that leave their files in $OUT (default: gpu):
#   bash benchmarks/gpu.sh start [FLAGS]   finds the fastest form of a step that works here, chooses a schedule that
#                                         takes TRAIN seconds (default: 540), and continues as train
#   bash benchmarks/gpu.sh train [FLAGS]   runs run_cifar10.sh for ROOM seconds (default: 540) on the folder of images
#                                         DATA, or on its archive DATA.tar.xz; each call continues the last call.
#                                         STEPS sets the length of the schedule and FORM the form of a step; without
#                                         them, train uses the values that start has found
#   bash benchmarks/gpu.sh check           runs the tests of CUDA, then profiles a step
#   bash benchmarks/gpu.sh step            measures views, every feedback and a whole step, with comparisons
# To test the script itself, run start and train with DEVICE=cpu and small FLAGS.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
OUT=${OUT:-gpu} TRAIN=${TRAIN:-540} ROOM=${ROOM:-540} DATA=${DATA:-data/cifar10-jpg} DEVICE=${DEVICE:-cuda}
mkdir -p "$OUT" checkpoint
found=checkpoint/gpu-form # the values that start has found
wrn="--device $DEVICE --model wrn-28-2 --batch-size 128 --mu 7 --amp --channels-last"
resnet="--device $DEVICE --model resnet50 --resize 224 --batch-size 32 --mu 7 --amp --channels-last"
ema="--weak-pass ema --feedback-view strong"
training=(bash "$root/run_cifar10.sh" --device "$DEVICE" --dataset folder --data-path "$DATA" --no-pictures)
nvidia-smi --query-gpu=name,memory.used,utilization.gpu --format=csv | tee "$OUT/gpu.csv" || true

benchmark() { # FILE COMMAND FLAGS
    PYTHONPATH=$root timeout 200 python -m "benchmarks.$2" "${@:3}" | tee "$OUT/$1.txt" || echo "$1 ended early"
}

unpack() {
    if [ ! -d "$DATA" ]; then
        mkdir -p "$DATA"
        tar -xJf "$DATA.tar.xz" -C "$DATA"
    fi
}

table() { # RUN: its evaluations. RUN SECONDS: the steps that they have room for
    python - "results/$1" "${@:2}" << 'EOF'
import json, statistics, sys
folder, *seconds = sys.argv[1:]
args = json.load(open(f"{folder}/args.json"))
rows = [row for row in map(json.loads, open(f"{folder}/metrics.jsonl")) if "images_per_second" in row]
times = [args["batch_size"] * (1 + args["mu"]) / row["images_per_second"] for row in rows]
if seconds:  # a fifteenth is left to the evaluations; the first line's time includes compiling
    print(round(int(seconds[0]) * 14 / 15 / statistics.median(times[1:])))
else:
    print("step    top1  teacher's labels right  ms/step")
    for row, taken in zip(rows, times):
        if "top1" in row:
            right = 100 * row.get("pseudo_label_accuracy", float("nan"))
            print(f"{row['step']:6} {row['top1']:6.2f} {right:12.2f} {1000 * taken:18.1f}")
EOF
}

find_form() { # FLAGS
    local forms=("--compile --cuda-graph" "--compile" "")
    unpack & # while the tests run
    timeout 150 python -m pytest "$root/tests/test_cuda.py" -k "replayed or program or captured" 2>&1 |
        tail -20 | tee "$OUT/tests.txt" || forms=("--compile" "")
    wait $!
    for form in "${forms[@]}"; do
        if timeout 150 "${training[@]}" --name gpu-form --overwrite $form "$@" --total-steps 200 --eval-step 200 \
            --log-step 50 --warmup-steps 50 --student-wait-steps 0 --uda-steps 50 --finetune-epochs 0 2>&1 | tail -3; then
            echo ": \"\${FORM=$form}\" \"\${STEPS:=$(table gpu-form "$TRAIN")}\"" | tee "$found" "$OUT/form.txt"
            return
        fi
    done
    echo "no form of a step works here" >&2
    exit 1
}

train() { # FLAGS
    [ ! -f "$found" ] || . "$found"
    FORM=${FORM---compile --cuda-graph} STEPS=${STEPS:-15000}
    # SIGTERM saves, and the next call continues there; on CUDA the sums may differ in their last bits
    timeout --signal TERM --kill-after 30 $((ROOM - SECONDS)) "${training[@]}" --name gpu-cifar10-4k --resume auto $FORM \
        --total-steps "$STEPS" --eval-step 1000 --warmup-steps $((STEPS / 60)) --student-wait-steps $((STEPS / 100)) \
        --uda-steps $((STEPS / 60)) "$@" 2>&1 | tail -40 || true
    # in pieces, for machines that hand back small files only: cat PIECES > gpu-cifar10-4k_last.pth.tar
    split -b 15m checkpoint/gpu-cifar10-4k_last.pth.tar "$OUT/gpu-cifar10-4k_last.pth.tar." || true
    cp results/gpu-cifar10-4k/[ams]*.json* "$OUT/" # args, metrics and, after the end of the run, the summary
    table gpu-cifar10-4k
}

case ${1:-check} in
start)
    find_form "${@:2}"
    train "${@:2}"
    ;;
train)
    unpack
    train "${@:2}"
    ;;
check)
    python -m pytest "$root"/tests/{test_cuda,engine/test_runtime}.py 2>&1 | tail -20 | tee "$OUT/tests.txt"
    benchmark eager profile $wrn
    benchmark compiled profile $wrn --compile
    benchmark graph profile $wrn --compile --cuda-graph
    benchmark graph-ema profile $wrn --compile --cuda-graph $ema
    benchmark photographs profile $resnet --compile --cuda-graph
    ;;
step)
    benchmark augment augment --device "$DEVICE" --static
    benchmark feedback feedback $wrn --repeats 20
    benchmark step step $wrn --compile --cuda-graph $ema --steps 20
    ;;
*)
    echo "benchmarks/gpu.sh: start, train, check or step, not '$1'" >&2
    exit 2
    ;;
esac
