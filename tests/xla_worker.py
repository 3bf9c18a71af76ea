"""What test_xla.py runs in a process of its own, on the XLA CPU client.

    PJRT_DEVICE=CPU CPU_NUM_DEVICES=2 python tests/xla_worker.py DEVICE FOLDER FLAGS…

Trains on digits for the steps that FLAGS say, and writes to FOLDER/RESULT.json the losses of every step, the
number of compilations after every step, the counters of operations that fell back to the host, and how the
last batch was split over the devices.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main
from data import TrainLoader, load_dataset
from methods import METHODS
from runtime import Runtime


def train(device, flags):
    args = main.parse_arguments(["--method", "mpl", "--dataset", "digits", "--device", device, *flags])
    runtime = Runtime(args.device)
    dataset = load_dataset("digits", num_labeled=args.num_labeled, seed=args.seed, resize=args.resize)
    views = main.build_views(args, dataset, runtime)
    torch.manual_seed(args.seed)
    method = METHODS[args.method](args, dataset.num_classes, dataset.size, runtime)
    loader = TrainLoader(dataset, args.batch_size, args.mu, args.seed, runtime)
    losses, compilations, batch_views = [], [], None
    for step in range(args.total_steps):
        batch = next(loader)
        runtime.seed(args.seed, step)
        batch_views = runtime.shard(views(batch.images_l, batch.targets, batch.images_u, loader.generator))
        losses.append(method.step(batch_views, step, batch.targets_u))
        runtime.finish_step()
        if device == "xla":
            from torch_xla.debug import metrics

            compilations.append(metrics.metric_data("CompileTime")[0])
    result = {"compilations": compilations, "fallbacks": [], "sharding": []}
    if device == "xla":
        import torch_xla

        names = [name for name in metrics.counter_names() if name.startswith("aten::")]
        result["fallbacks"] = names  # read before the losses are, which counts as one
        result["sharding"] = [torch_xla._XLAC._get_xla_sharding_spec(view) for view in batch_views]
    result["losses"] = [{name: value.item() for name, value in step.items()} for step in losses]
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    device, path, *flags = sys.argv[1:]
    Path(path).write_text(json.dumps(train(device, flags)))
