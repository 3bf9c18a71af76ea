"""How fast the program is. Each command is one module; run them in the repository's folder:

    python -m benchmarks.step       a whole training step, compared with a step as public code writes it
    python -m benchmarks.feedback   the cost of each feedback and of each --weak-pass
    python -m benchmarks.profile    the phases and kernels of a step
    python -m benchmarks.augment    weak and strong views, compared with Pillow
    python -m benchmarks.start      from the command line to the first trained step
    bash benchmarks/methods.sh      the accuracy of every method over several seeds
    bash benchmarks/gpu.sh          measurements on a GPU, in calls of ten minutes

A single figure says as much about the machine as about the code. Therefore every comparison measures both
variants in turns, in one run, and prints the ratio of their medians. Commands that take training steps also
accept main.py's flags: ``--model wrn-28-2 --batch-size 16 --feedback exact --compile``.
"""
