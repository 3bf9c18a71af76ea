"""What test_xla.py runs in a process of its own, on the XLA CPU client.

    PJRT_DEVICE=CPU CPU_NUM_DEVICES=2 python tests/xla_worker.py train RUNS.json RESULTS.json
    PJRT_DEVICE=CPU CPU_NUM_DEVICES=1 python tests/xla_worker.py call COMMANDS.json RESULTS.json

COMMANDS.json holds the flags of main.py for one run after the other. RESULTS.json, for each run: the number
of compilations after the set-up and after every step and batch.

RUNS.json holds the flags of each run by its name. Every run trains on digits for some steps. The method is
given views made on the host, so that devices can be compared; on XLA the same views are made there too, with
the same random numbers. RESULTS.json, for each run: the losses of every step, and on XLA the number of
compilations after every step, the operations that fell back to the host, how the views were split over the
devices, and the share of pixels that the device made otherwise.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main
from augmentation import Views
from data import load_dataset
from engine.loader import TrainLoader
from engine.runtime import Runtime
from methods import METHODS
from utils import Meters


def train(device, flags, folder):
    args = main.parse_arguments(["--method", "mpl", "--dataset", "digits", "--device", device, *flags])
    host, runtime = Runtime("cpu"), Runtime(args.device)
    dataset = load_dataset("digits", num_labeled=args.num_labeled, seed=args.seed, resize=args.resize)
    host_views, device_views = (main.build_views(args, dataset, where) for where in (host, runtime))
    torch.manual_seed(args.seed)
    method = METHODS[args.method](args, dataset.num_classes, dataset.size, runtime)
    method.prepare(dataset, device_views, folder)
    loader = TrainLoader(dataset, args.batch_size, args.mu, args.seed, host)
    meters = Meters(runtime, "")
    losses, compilations, differing, views = [], [], [], None
    runtime.finish_step()
    if device == "xla":
        import torch_xla
        from torch_xla.debug import metrics

        metrics.clear_all()  # what a run before this one has counted
    for step in range(args.total_steps):
        batch = next(loader)
        runtime.seed(args.seed, step)
        before = loader.generator.get_state()
        drawn = host_views(batch.images_l, batch.targets, batch.images_u, loader.generator)
        views = Views(*(None if tensor is None else tensor.to(runtime.device) for tensor in drawn[:4]))
        views = runtime.shard(views)._replace(indices=batch.indices_u.to(runtime.device))
        losses.append(method.step(views, step, batch.targets_u.to(runtime.device)))
        meters.update(losses[-1], step)
        if device == "xla":
            loader.generator.set_state(before)
            images_l, targets, images_u = (tensor.to(runtime.device) for tensor in batch[:3])
            made = runtime.shard(device_views(images_l, targets, images_u, loader.generator))
            pairs = [(views.labeled, made.labeled), (views.weak, made.weak), (views.strong, made.strong)]
            pairs = pairs if method.uses_strong_view else pairs[:2]
            differing.append([((one - other).abs() > 1e-4).float().mean() for one, other in pairs])
        runtime.finish_step()
        if device == "xla":
            compilations.append(metrics.metric_data("CompileTime")[0])
        if step == 2:  # as where a line is written
            meters.reset()
    result = {"compilations": compilations}
    if device == "xla":
        names = [name for name in metrics.counter_names() if name.startswith("aten::")]
        result["fallbacks"] = names  # before the losses are read, which counts as one
        made = [view for view in views[:4] if view is not None]
        result["sharding"] = [torch_xla._XLAC._get_xla_sharding_spec(view) for view in made]
        result["differing"] = [[share.item() for share in step] for step in differing]
    result["losses"] = [{name: value.item() for name, value in step.items()} for step in losses]
    return result


def call(flags):
    """``main.py`` with these flags, which ends well: how many graphs are compiled by the end of each step."""
    compilations = []

    class Counting(Runtime):
        def finish_step(self):
            from torch_xla.debug import metrics  # not before the runtime imports it

            super().finish_step()
            compilations.append((metrics.metric_data("CompileTime") or [0])[0])

    main.Runtime = Counting
    assert main.run(flags) == 0
    return compilations


if __name__ == "__main__":
    given, path = json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    if sys.argv[1] == "call":
        results = [call(flags) for flags in given]
    else:
        results = {name: train("xla", flags, str(path.with_name(name))) for name, flags in given.items()}
    path.write_text(json.dumps(results))
