"""Seconds from the command to the end of one training step of the digits recipe, with its evaluation.

The import of PyTorch takes most of this time and is measured, too.

    python -m benchmarks.start
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common import median_seconds, new_parser, run

RECIPE = Path(__file__).parent.parent / "recipes" / "digits.sh"


def main(argv=None):
    parser = new_parser("benchmarks.start", __doc__)
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each command")
    args, flags = parser.parse_known_args(argv)  # main.py's, such as --compile
    with tempfile.TemporaryDirectory() as folder:
        one_step = "--total-steps 1 --finetune-epochs 0 --no-pictures --overwrite --device cpu".split()
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "one step of digits": ["bash", RECIPE, *one_step, *flags],
        }

        def start(command):
            return lambda: subprocess.run(command, cwd=folder, check=True, capture_output=True)

        seconds = median_seconds([start(command) for command in commands.values()], args.repeats)
    for what, each in zip(commands, seconds, strict=True):
        print(f"{what:<24}{each:>8.2f} s")


if __name__ == "__main__":
    run("benchmarks.start", main)
