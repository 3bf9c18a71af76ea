"""Where this process runs: device, precision, processes, random state, files on disk.

Everything that differs between one CPU, one GPU and several processes is here, so that the rest of the
program reads as if there were one device. ``Runtime`` is made once, in ``main.py``, and handed down.
"""

import contextlib
import ctypes
import importlib.util
import os
import platform
import shutil
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from engine.cuda_graph import StepGraph
from engine.files import read_content, write_atomically
from engine.norms import SumBatchNorm, SyncBatchNorm, XLABatchNorm, with_norms
from utils import UserError


def keep_freed_memory():
    """Let this process keep the memory of freed tensors for the next ones, where the C library is glibc.

    By default glibc gives large blocks back to the system at once and gets them again as pages that the
    system must find and clear: up to a fifth of a step's time on the CPU. The process stays as large as it
    once was. See ``mallopt(3)``; the numbers are those of glibc's ``malloc.h``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, -1)  # never shrink the heap
        mallopt(mmap_max, 0)  # take all from the heap


def other_accelerator():
    """The kind of this machine's accelerator, such as ``xpu`` or ``npu``, where PyTorch knows one that is
    neither CUDA nor MPS; else the CPU."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None or device.type in ("cuda", "mps") else device.type


class Runtime:
    """The device of this process, its numeric precision and its place among the processes.

    Args:
        device: ``cpu``, ``cuda``, ``mps``, ``xla``, the kind of another accelerator that PyTorch knows, or
            ``auto``: CUDA where there is one, else MPS, else another accelerator, else the CPU.
        amp: run the networks' forward passes under autocast.
        amp_dtype: ``bf16``, or ``fp16`` with gradient scaling (CUDA only).
        channels_last: keep images and filters in the memory order that convolutions are fastest in.
        sync_bn: batch norm takes its statistics over the batches of all processes.
        compiled: training passes go through ``torch.compile``.
        graphed: training steps are replayed as a CUDA graph; without CUDA they are taken as they are.
        alone: this process does something by itself, whatever others it was started with.

    Raises:
        UserError: a device that is not there, a precision that it does not have, or no compiler.

    Started by ``torchrun`` there is one process per GPU (NCCL) or per rank on CPU (gloo); ``rank`` and
    ``world_size`` tell them apart. A process started alone is rank 0 of 1.

    On XLA all devices run one SPMD program: batches are sharded over a mesh with the one axis ``data``, and
    sums over a batch, batch statistics among them, are sums over all devices with nothing written for it.
    Every host runs the same program on the same batches, so ``world_size`` is 1; hosts agree on what the
    program does (which checkpoint, when to stop) through a gloo group, and the files are the first host's.
    """

    KINDS = tuple(dict.fromkeys(("auto", "cpu", "cuda", "mps", "xla", other_accelerator())))

    def __init__(
        self,
        device="auto",
        amp=False,
        amp_dtype="bf16",
        channels_last=False,
        sync_bn=False,
        compiled=False,
        graphed=False,
        alone=False,
    ):
        if device == "auto":
            device = self.best()
        if device not in self.KINDS:
            raise UserError(f"device '{device}' is not known: use {', '.join(self.KINDS)}")
        if device == "cuda" and not self.available(device):
            raise UserError("--device cuda, but PyTorch sees no CUDA device here: use --device cpu or auto")
        if device == "mps" and not self.available(device):
            raise UserError("--device mps, but PyTorch sees no Apple GPU here: use --device cpu or auto")

        if device == "cpu":
            keep_freed_memory()
        self.kind, self.alone = device, alone
        self.host, self.hosts = 0, 1  # of XLA's single program
        self.rank = 0 if alone else int(os.environ.get("RANK", 0))
        self.world_size = 1 if alone else int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device(device)
        if device not in ("cpu", "mps", "xla"):  # may be several
            self.device = torch.device(device, local_rank)
            torch.accelerator.set_device_index(local_rank)
        if device == "cuda":
            torch.backends.cudnn.benchmark = True  # shapes are static: the search pays once
            torch.backends.cuda.matmul.fp32_precision = "tf32"  # as convolutions have it by default
        if device == "xla":
            self._start_xla()
        elif self.world_size > 1 and not dist.is_initialized():
            self._join_processes()
        self.configure(amp, amp_dtype, channels_last, sync_bn, compiled, graphed)

    @classmethod
    def best(cls):
        """The kind of device that ``auto`` means here."""
        return next(filter(cls.available, ("cuda", "mps", other_accelerator())))

    @staticmethod
    def available(device):
        """Whether this machine has such a device."""
        found = {
            "cuda": torch.cuda.is_available,
            "mps": torch.backends.mps.is_available,
            "xla": lambda: importlib.util.find_spec("torch_xla") is not None,
        }
        return found.get(device, lambda: device in ("auto", "cpu", other_accelerator()))()

    def configure(
        self, amp=False, amp_dtype="bf16", channels_last=False, sync_bn=False, compiled=False, graphed=False
    ):
        """Choose precision, memory order and the like, before any network is placed; as the constructor."""
        if amp and amp_dtype == "fp16" and self.kind != "cuda":
            raise UserError(f"--amp-dtype fp16 needs CUDA: use --amp-dtype bf16 on {self.kind}")
        if compiled and self.kind == "xla":
            raise UserError("--device xla compiles by itself: leave --compile out")
        if compiled and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
            raise UserError("--compile needs a C++ compiler, and there is none here: install g++")
        self.channels_last = channels_last
        self.sync_bn = sync_bn
        self.compiled = compiled
        self.graphed = graphed and self.kind == "cuda"
        self.capturing = None  # the StepGraph that is being captured
        if self.graphed and self.world_size > 1:
            raise UserError("--cuda-graph is for a single process: give --no-cuda-graph under torchrun")
        if graphed and not self.graphed and self.is_main and not self.alone:
            print(f"--cuda-graph needs CUDA: steps are taken as they are on {self.kind}", file=sys.stderr)
        if compiled:
            # dropout draws the same with and without: the feedback repeats the student's pass
            torch._inductor.config.fallback_random = True
            # the gradient behind a leaky ReLU reads six tensors; by default it is written out from five on
            torch._inductor.config.realize_reads_threshold = 8
        self.amp_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp_dtype] if amp else None
        if self.amp_dtype == torch.bfloat16 and not self._has_bf16():
            self.amp_dtype = None
            if self.is_main and not self.alone:
                print(f"this {self.kind} device has no bf16: computing in float32", file=sys.stderr)

    def _join_processes(self):
        """Form the process group.

        What torchrun starts again on one machine would find, in the store of its agent, the addresses of
        processes that are gone: so each attempt has names of its own there. Attempts are not counted alike on
        several machines; with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 each has a store of its own instead.
        """
        store, rank, world_size = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend = dist.get_default_backend_for_device(self.kind)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)

    def _start_xla(self):
        if self.world_size > 1:
            raise UserError("--device xla is one process per host, started without torchrun")
        # a number that happens to be 0 or 1 is otherwise part of the graph, which is compiled anew for it
        os.environ.setdefault("XLA_NO_SPECIAL_SCALARS", "1")
        try:
            import torch_xla
            import torch_xla.distributed.spmd as spmd
            import torch_xla.runtime as xla_runtime
        except ImportError as error:
            raise UserError(
                "--device xla needs torch_xla with the torch that it was made for: pip install -r "
                "requirements-xla.txt"
            ) from error
        xla_runtime.use_spmd()
        self.device = torch_xla.device()
        self.xla, self.spmd = torch_xla, spmd
        self.num_devices = xla_runtime.global_runtime_device_count()
        self.mesh = spmd.Mesh(np.arange(self.num_devices), (self.num_devices,), ("data",))
        self.host, self.hosts = xla_runtime.process_index(), xla_runtime.process_count()
        if self.hosts > 1 and not dist.is_initialized():
            import torch_xla.distributed.xla_backend  # makes xla:// known

            dist.init_process_group("gloo", init_method="xla://")

    @property
    def is_main(self):
        """True in the one process that prints and writes files."""
        return self.rank == 0 and self.host == 0

    @property
    def processes(self):
        """How many run this program: XLA's hosts, or processes with a part of the batch each."""
        return max(self.world_size, self.hosts)

    @property
    def static(self):
        """True where shapes should be static and no branch depend on data: everywhere but on the CPU."""
        return self.kind != "cpu"

    def describe(self):
        """The device in words, for people and for summary.json."""
        if self.kind == "xla":
            return f"{self.num_devices} × xla ({os.environ.get('PJRT_DEVICE', 'TPU')})"
        name = f"{os.cpu_count()} cores"
        if self.kind == "cuda":
            name = torch.cuda.get_device_name(self.device)
        elif self.kind not in ("cpu", "mps"):
            name = "eager, not tested on this device"
        return f"{self.world_size} × {self.kind} ({name})" if self.world_size > 1 else f"{self.kind} ({name})"

    def _has_bf16(self):
        if self.kind == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        if self.kind != "cpu":
            return True
        if platform.machine() in ("x86_64", "AMD64"):  # others than these emulate it, slower than float32
            checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            return any(getattr(torch.cpu, check, bool)() for check in checks)
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def place(self, network):
        """The network on the device, in the chosen memory order; images follow the order of the filters."""
        if self.sync_bn and self.world_size > 1:
            network = with_norms(network, SyncBatchNorm)
        elif self.kind == "xla":
            network = with_norms(network, XLABatchNorm)
        elif self.compiled and self.kind == "cpu":
            network = with_norms(network, SumBatchNorm, SumBatchNorm.fits)
        memory_format = torch.channels_last if self.channels_last else torch.preserve_format
        network = network.to(self.device, memory_format=memory_format)
        self.replicate(network.state_dict().values())
        return network

    def parallel(self, network):
        """What to call for a training pass through a placed network, so that ``backward`` averages the
        gradients over all processes; the network itself where there is one process and no compiling."""
        training = network
        if self.world_size > 1:
            devices = None if self.kind == "cpu" else [self.device]
            # Running statistics are each process's own until they are averaged for evaluation.
            training = DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)
        return self.compile(training)

    def compile(self, function):
        """The function or network, through ``torch.compile`` where that was asked for; shapes are static."""
        return torch.compile(function, dynamic=False) if self.compiled else function

    def uncompiled(self):
        """Context in which nothing is compiled: a compiled graph can be passed backward only once."""
        return torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()

    def no_sync(self, network):
        """Context in which the backward pass through what ``parallel`` returned adds up this process's
        gradients and averages nothing: for all parts of a batch but the last."""
        return network.no_sync() if self.world_size > 1 else contextlib.nullcontext()

    def shard(self, tensors):
        """XLA: split each tensor of the tuple over the devices, along its first dimension; returns the tuple.

        A dimension that the number of devices does not divide stays whole on each.
        """
        if self.kind == "xla":
            for tensor in tensors:
                if tensor is not None and len(tensor) % self.num_devices == 0:
                    self.spmd.mark_sharding(tensor, self.mesh, ("data", *[None] * (tensor.ndim - 1)))
        return tensors

    def replicate(self, tensors):
        """XLA: tell of each tensor what holds after a step anyway, that each device has the whole of it."""
        if self.kind == "xla":
            for tensor in tensors:
                self.spmd.mark_sharding(tensor, self.mesh, (None,) * tensor.ndim)

    def graph(self, function, *generators):
        """A training step, (batch, step) → {name: () tensor}, as a ``StepGraph`` where that was asked for."""
        return StepGraph(self, function, generators) if self.graphed else function

    def number(self, function, step):
        """``function(step)``, a number that changes from step to step.

        In a captured step it is a () tensor, float32, which every replay fills with the number of its step;
        where steps are captured, those between are taken with the same number, rounded to float32.
        """
        if self.capturing:
            return self.capturing.number(function)
        return float(np.float32(function(step))) if self.graphed else function(step)

    def scalar(self, value):
        """A number that changes from step to step, for arithmetic with tensors.

        On XLA a tensor: numbers that are equal share one input of a graph there, so that another one would
        have to be compiled for such steps.
        """
        return torch.tensor([value]).to(self.device)[0] if self.kind == "xla" else value

    def finish_step(self):
        """The end of a step or of a batch of evaluation. XLA now compiles and runs what was recorded."""
        if self.kind == "xla":
            self.xla.sync()

    def zeros(self, *shape):
        """Float32 zeros on the device.

        On XLA they are data, whereas ``torch.zeros`` is an operation of the next graph, which would be
        another one than that of a later step.
        """
        return self.put(torch.zeros(shape, device="cpu" if self.kind == "xla" else self.device))

    def put(self, tensor):
        """The tensor on the device; where the device is several, on each the whole of it."""
        tensor = tensor.to(self.device)
        self.replicate([tensor])
        return tensor

    def wait(self):
        """Until the device has done all that it was asked to: for measuring time."""
        if self.kind == "xla":
            self.xla.sync(wait=True)
        elif self.kind != "cpu":
            torch.accelerator.synchronize()

    # precision

    def autocast(self, scaled=True):
        """Context in which matrix products and convolutions run in the chosen precision.

        Gradients that no scaler protects (``scaled=False``) are not computed in fp16, where they would
        vanish, but in float32.
        """
        enabled = self.amp_dtype is not None and (scaled or self.amp_dtype != torch.float16)
        return torch.autocast(self.kind, dtype=self.amp_dtype, enabled=enabled)

    @contextlib.contextmanager
    def full_float32(self):
        """Context in which float32 products have all their 24 bits: for differences of close values."""
        products = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
        before = [product.fp32_precision for product in products]
        try:
            for product in products:
                product.fp32_precision = "ieee"
            yield
        finally:
            for product, precision in zip(products, before, strict=True):
                product.fp32_precision = precision

    def grad_scaler(self):
        """A gradient scaler, active for fp16 only: bf16 has the range of float32."""
        enabled = self.amp_dtype == torch.float16
        return torch.amp.GradScaler(self.kind if enabled else "cpu", enabled=enabled)

    # processes

    def all_reduce_mean(self, tensors):
        """Replace each tensor of the list, in place, by its mean over all processes; returns the list."""
        if self.world_size > 1 and tensors:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(flat)
            flat /= self.world_size
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))
        return tensors

    def all_reduce_sum(self, tensor):
        """Replace the tensor, in place, by its sum over all processes; returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, tensor):
        """Replace the tensor, in place, by its largest value over all processes; returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def all_gather(self, tensor):
        """The tensors of all processes, of one shape, one behind the other along the first dimension."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def all_reduce_max_int(self, number):
        """The largest of the whole numbers that all processes call this with, a () tensor. Reading it waits
        for the others."""
        device = "cpu" if self.kind == "xla" else self.device
        tensor = torch.tensor(number, device=device)
        if self.processes > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    @contextlib.contextmanager
    def local_main_first(self):
        """Context that one process of each machine goes through before the others: to download, say.

        Where it raises a UserError there, the others end without a word, with the same exit status.
        """
        first, error = int(os.environ.get("LOCAL_RANK", 0)) == 0, None
        if first:
            try:
                yield
            except UserError as raised:
                error = str(raised)
        failed = bool(self.all_reduce_max_int(int(error is not None)))
        if error:
            raise UserError(error)
        if failed:
            sys.exit(2)
        if not first:
            yield

    def barrier(self):
        if self.processes > 1:
            dist.barrier()

    def on_main(self, function):
        """What ``function()`` returns in the main process, which alone calls it: the same answer in all.

        What it raises there is raised there; the others end without a word, with the same exit status.
        """
        if self.processes == 1:
            return function()
        outcome = [None, 0]
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:
                dist.broadcast_object_list([None, 2 if isinstance(error, UserError) else 1])
                raise
        dist.broadcast_object_list(outcome)
        answer, status = outcome
        if status:
            sys.exit(status)
        return answer

    def close(self):
        """At the end of what all processes have done together. After an error there is none: it could wait
        for the others."""
        if self.processes > 1:
            dist.destroy_process_group()

    # random state

    def generator(self, seed):
        """A seeded ``torch.Generator``, on the device; on XLA, which has none, on the host."""
        device = "cpu" if self.kind == "xla" else self.device
        return torch.Generator(device=device).manual_seed(seed)

    def seed(self, *key):
        """Seed the default random generators, which dropout draws from, by a key of integers.

        Each process gets a stream of its own. Seeded at every step by its number, a run needs to remember
        nothing to go on with the same random numbers.
        """
        seed = int(np.random.SeedSequence((*key, self.rank)).generate_state(1)[0])
        if self.kind not in ("cpu", "xla"):
            torch.manual_seed(seed)
        else:  # without a search for other devices, which takes longer than a small operation
            torch.default_generator.manual_seed(seed)
        if self.kind == "xla":
            self.xla.manual_seed(seed)

    def rng_state(self):
        """State of the default random generators, which dropout draws from; no wait for the device.

        Empty while a step is captured: there it cannot be read, and nothing is drawn again (``replay``).
        """
        if self.capturing:
            return {}
        state = {"cpu": torch.get_rng_state()}
        if self.kind == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        elif self.kind == "mps":
            state["mps"] = torch.mps.get_rng_state()
        elif self.kind == "xla":
            state["xla"] = self.xla.core.xla_model.get_rng_state()
        elif self.kind != "cpu":
            state[self.kind] = torch.get_device_module(self.device).get_rng_state(self.device)
        return state

    def set_rng_state(self, state):
        """Continue from ``rng_state()``."""
        if not state:
            return
        torch.set_rng_state(state["cpu"])
        if self.kind == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
        elif self.kind == "mps":
            torch.mps.set_rng_state(state["mps"])
        elif self.kind == "xla":
            self.xla.core.xla_model.set_rng_state(state["xla"])
        elif self.kind != "cpu":
            torch.get_device_module(self.device).set_rng_state(state[self.kind], self.device)

    @contextlib.contextmanager
    def replay(self, state):
        """Context that draws the random numbers (the dropout masks) drawn after ``state`` once more; with
        None it draws new ones.

        Raises:
            UserError: there are some, but steps are replayed as a CUDA graph, which cannot do that.
        """
        if state is None:
            yield
            return
        now = self.rng_state()
        if self.graphed and any(not torch.equal(state[name], now[name]) for name in state):
            raise UserError(
                "--cuda-graph cannot draw the same dropout twice in a step, as --feedback exact and "
                "--accumulate do: leave out this flag, or the dropout"
            )
        self.set_rng_state(state)
        try:
            yield
        finally:
            self.set_rng_state(now)

    # files

    def save(self, state, *paths):
        """Write ``state`` to each path; a crash at any moment leaves the old file or the new one whole.

        The paths are written one after the other; the state leaves the device once. Only the main process
        writes; all return when the files are there.
        """

        def write():
            content = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), state)
            for path in paths:
                write_atomically(path, lambda file: torch.save(content, file))

        self.on_main(write)

    def load(self, path):
        """Read what ``save`` wrote, onto the CPU. Never runs code from the file (``weights_only``).

        The main process reads; the others, which may be on machines without the file, get it from there.

        Raises:
            UserError: no such file, or not a readable checkpoint.
        """
        return self.on_main(lambda: read_content(path))


# ---------------------------------------------------------------- a step as a CUDA graph


# ---------------------------------------------------------------- batch norm on XLA and over processes
