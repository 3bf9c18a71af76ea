#!/usr/bin/env bash
# Trains every method on handwritten digits (20 and 40 labels) and on two moons, with five seeds each, and prints
# Markdown tables. The same command continues after a stop; several calls at once on one machine share the runs.
#   bash benchmarks/methods.sh [FLAGS]      gives FLAGS of main.py to every run
#   METHODS="supervised mpl" TASKS=digits-40 SEEDS="0 1" STEPS=90 OUT=results/short bash benchmarks/methods.sh
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

# A method: its name and its flags. @NAME is the checkpoint of the method NAME on the same task and seed.
methods=(
    "supervised        --method supervised"
    "mixup             --method supervised --mixup-alpha 1"
    "uda               --method uda"
    "uda-relative      --method uda --confidence relative --threshold 0.9"
    "uda-soft          --method uda --confidence soft"
    "fixmatch          --method fixmatch --threshold 0.95"
    "pseudo-label      --method pseudo-label --teacher-checkpoint @supervised"
    "noisy-student     --method pseudo-label --teacher-checkpoint @pseudo-label --pseudo-label soft"
    "mpl-none          --method mpl --feedback none"
    "mpl               --method mpl"
    "mpl-exact         --method mpl --feedback exact --pseudo-label soft"
    "role-playing      --method mpl --switch-every 100 --ensemble"
    "reduced-mpl       --method reduced-mpl --teacher-checkpoint @supervised --feedback exact --pseudo-label soft --teacher-lr 10"
    "semimeta          --method semimeta --mixup-alpha 1 --lambda-u 1 --bn-momentum 0.1"
)
baseline=supervised # the method that the tables compare the others with
# A task: its name, labels and recipe, and flags for all methods; on digits they cut the work to an eighth.
tasks=(
    "digits-20    20   recipes/digits.sh     --model wrn-10-1 --batch-size 16"
    "digits-40    40   recipes/digits.sh     --model wrn-10-1 --batch-size 16"
    "twomoons-6   6    recipes/twomoons.sh"
)
OUT=${OUT:-results/methods} SEEDS=${SEEDS:-0 1 2 3 4} STEPS=${STEPS:-}
METHODS=${METHODS:-${methods[*]%% *}} TASKS=${TASKS:-${tasks[*]%% *}}
mkdir -p "$OUT" && said=$(mktemp) || exit
trap 'rm -f "$said"' EXIT

among() { [[ " ${*:2} " == *" $1 "* ]]; }
finished() { [ -e "$OUT/$1/finished" ]; }

# Goes over all runs until a round starts none: the runs that are left have failed or run in another call.
failed="" started=yes
while [ "$started" ]; do
    started=""
    for seed in $SEEDS; do for task in "${tasks[@]}"; do for method in "${methods[@]}"; do
        read -r data labels recipe common <<< "$task"
        read -ra flags <<< "$method"
        run=${flags[0]}-$data-$seed
        among "${flags[0]}" $METHODS && among "$data" $TASKS && ! among "$run" $failed && ! finished "$run" || continue
        for i in "${!flags[@]}"; do
            if [[ ${flags[i]} == @* ]]; then
                teacher=${flags[i]#@}-$data-$seed
                finished "$teacher" || continue 2
                flags[i]=$OUT/checkpoint/${teacher}_best.pth.tar
            fi
        done
        bash "$root/$recipe" --name "$run" --num-labeled "$labels" --seed "$seed" --finetune-epochs 0 --resume auto \
            --results-path "$OUT" --save-path "$OUT/checkpoint" ${STEPS:+--total-steps "$STEPS"} \
            $common "${flags[@]:1}" "$@" 2>&1 < /dev/null | tee -i "$said"
        status=${PIPESTATUS[0]}
        if [ "$status" = 0 ]; then
            touch "$OUT/$run/finished"
            started=yes
        elif [ "$status" -gt 128 ]; then # a signal
            exit "$status"
        elif ! grep -q "another process is training" "$said"; then
            failed+=" $run"
        fi
    done; done; done
done

waiting=""
for task in "${tasks[@]}"; do
    data=${task%% *} runs=() against=()
    for method in "${methods[@]%% *}"; do for seed in $SEEDS; do
        run=$method-$data-$seed
        if ! finished "$run"; then
            among "$method" $METHODS && among "$data" $TASKS && ! among "$run" $failed && waiting+=" $run"
            continue
        fi
        runs+=("$OUT/$method-$data-$seed")
        [ "$method" != "$baseline" ] || against=(--baseline "$baseline-$data")
    done; done
    [ "${#runs[@]}" -gt 0 ] || continue
    printf '\n%s\n\n' "$data"
    python "$root/visualize.py" table "${runs[@]}" ${against[@]+"${against[@]}"} || exit
done
[ -z "$waiting" ] || echo "benchmarks/methods.sh: running in another call, or their teachers are not in METHODS:$waiting" >&2
status=0
for run in $failed; do
    finished "$run" || { echo "benchmarks/methods.sh: $run has failed" >&2 && status=1; }
done
exit "$status"
