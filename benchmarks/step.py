"""Images per second of whole training steps, compared with a step as public code writes it.

    python -m benchmarks.step --model wrn-28-2 --batch-size 16 --amp --channels-last
    python -m benchmarks.step … --weak-pass ema --feedback-view strong --compile

Both start from images in memory. The flags of main.py set this project's step. In the plain step they set
only the network, the batch, the optimisers and the weights of the losses.
"""

import itertools

import torch

from benchmarks.common import (
    StepProcess,
    describe,
    medians,
    new_parser,
    parse_step,
    print_ratios,
    processor_cores,
    run,
    seconds_of,
)
from benchmarks.plain import PlainImages, PlainStep
from engine.runtime import Runtime


def main(argv=None):
    parser = new_parser("benchmarks.step", __doc__)
    parser.add_argument("--steps", type=int, default=5, help="steps in a measurement")
    args = parse_step(parser, argv)
    options = args.options

    # this project's step runs in a process of its own, since its runtime changes how memory is kept on the
    # CPU; its settings for a GPU (TF32, cuDNN's search) serve both
    here = StepProcess(args.words, args.threads)
    device = torch.device("cpu") if options.device == "cpu" else Runtime(options.device).device
    plain = PlainStep(options, options.resize, device)
    workers = processor_cores()
    ahead = 2 * workers  # batches that the workers make before they are asked for: PyTorch's default
    images = PlainImages((1 + args.steps + ahead) * options.batch_size, options.mu, options.resize)
    loader = torch.utils.data.DataLoader(
        images, options.batch_size, shuffle=True, num_workers=workers, persistent_workers=True
    )

    def reference():
        batches = iter(loader)
        plain(*next(batches))  # wait until the workers have begun

        def steps():  # each ends by reading its losses from the device
            for batch in itertools.islice(batches, args.steps):
                plain(*batch)

        seconds = seconds_of(steps)
        for _ in batches:  # use up the batches made ahead, so that workers rest during the other measurement
            pass
        return seconds

    seconds = medians([lambda: here(args.steps), reference], args.repeats)
    here.close()
    print(f"{describe(options, args.threads)}; the plain step: {workers} worker(s)")
    print("ms per step: {:.1f} here, {:.1f} plain".format(*(1000 * each / args.steps for each in seconds)))
    count = args.steps * options.batch_size * (1 + options.mu)
    print_ratios("images/s; reference: a plain step", [("whole step", *(count / each for each in seconds))])


if __name__ == "__main__":
    run("benchmarks.step", main)
