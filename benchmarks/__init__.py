"""How fast the program is. Each command is one module; run them in the repository's folder:

    python -m benchmarks.step       a whole training step, beside a step as public code writes it
    python -m benchmarks.feedback   what each feedback, and each way to pass the weak views, costs
    python -m benchmarks.profile    a step's phases and kernels
    python -m benchmarks.augment    weak and strong views, beside Pillow
    python -m benchmarks.start      from the command line to the first trained step
    bash benchmarks/methods.sh      the accuracy of every method, over seeds
    bash benchmarks/gpu.sh          what needs a GPU, in calls of ten minutes

A figure alone says as much about the machine as about the code. So every comparison measures both ways in
turns, in one run, and prints the ratio of the medians. Commands that take training steps also accept
main.py's flags: ``--model wrn-28-2 --batch-size 16 --feedback exact --compile``.
"""
