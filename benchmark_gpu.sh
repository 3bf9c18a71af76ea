#!/usr/bin/env bash
# What wants a CUDA device, in calls of at most ten minutes each that leave their files in $OUT (default: gpu):
#   bash benchmark_gpu.sh check           the tests of CUDA, then a step taken apart: as it is, compiled, as a CUDA graph
#   bash benchmark_gpu.sh step            every feedback, a plain step beside it, and how the cost grows
#   bash benchmark_gpu.sh train [FLAGS]   CIFAR-10 with 4,000 labels and the full recipe; each call goes on where the
#                                         last one was stopped. STEPS (15000) is the length of the schedule, ROOM
#                                         (540) the seconds of a call, DATA a folder of images, or its archive .tar.xz;
#                                         FORM (--compile --cuda-graph) how steps are taken
set -euo pipefail
OUT=${OUT:-gpu} STEPS=${STEPS:-15000} ROOM=${ROOM:-540} DATA=${DATA:-data/cifar10-jpg}
FORM=${FORM---compile --cuda-graph}
mkdir -p "$OUT"
recipe="--device cuda --model wrn-28-2 --batch-size 128 --mu 7 --amp --channels-last"
photographs="--device cuda --model resnet50 --size 224 --batch-size 32 --mu 7 --amp --channels-last"
ema="--weak-pass ema --feedback-view strong"
nvidia-smi --query-gpu=name,memory.used,utilization.gpu --format=csv | tee "$OUT/gpu.csv"

profile() { # NAME FLAGS
    timeout 120 python benchmark.py profile "${@:2}" --repeats 5 --json "$OUT/$1.json" | tee "$OUT/$1.txt" ||
        echo "the profile $1 ended early"
}

case ${1:-check} in
check)
    python -m pytest tests/test_cuda.py tests/test_runtime.py 2>&1 | tail -20 | tee "$OUT/tests.txt"
    profile eager $recipe
    profile compiled $recipe --compile
    profile graph $recipe --compile --cuda-graph
    profile graph-ema $recipe --compile --cuda-graph $ema
    profile photographs $photographs --compile --cuda-graph
    ;;
step)
    python benchmark.py augment --device cuda --static | tee "$OUT/augment.txt"
    python benchmark.py step $recipe --repeats 20 | tee "$OUT/step.txt"
    python benchmark.py step --plain $recipe --compile --cuda-graph $ema --repeats 5 --steps 20 | tee "$OUT/plain.txt"
    python benchmark.py cost $recipe --repeats 10 --batches 32 64 128 256 --json "$OUT/cost.json" \
        --picture "$OUT/cost.png" | tee "$OUT/cost.txt"
    ;;
train)
    if [ ! -d "$DATA" ]; then
        mkdir -p "$DATA"
        tar -xJf "$DATA.tar.xz" -C "$DATA"
    fi
    # SIGTERM saves; the next call goes on from there, bit for bit but for what CUDA adds up in another order
    timeout --signal TERM --kill-after 30 "$ROOM" bash run_cifar10.sh --name gpu-cifar10-4k --resume auto \
        $FORM --dataset folder --data-path "$DATA" --total-steps "$STEPS" --eval-step 1000 \
        --warmup-steps $((STEPS / 60)) --student-wait-steps $((STEPS / 100)) --uda-steps $((STEPS / 60)) "${@:2}" \
        2>&1 | tail -40 || true
    # in pieces, for those who can bring back small files alone: cat PIECES > gpu-cifar10-4k_last.pth.tar
    split -b 15m checkpoint/gpu-cifar10-4k_last.pth.tar "$OUT/gpu-cifar10-4k_last.pth.tar." || true
    cp -r results/gpu-cifar10-4k "$OUT/" || true
    python - results/gpu-cifar10-4k/metrics.jsonl << 'EOF'
import json, sys
print("step    top1  teacher's labels right  ms/step")
for line in open(sys.argv[1]):
    row = json.loads(line)
    if "top1" in row:
        right = 100 * row.get("pseudo_label_accuracy", float("nan"))
        print(f"{row['step']:6} {row['top1']:6.2f} {right:12.2f} {1000 * 128 * 8 / row['images_per_second']:18.1f}")
EOF
    ;;
esac
