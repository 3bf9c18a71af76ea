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
    """If the C library is glibc: keep the memory of freed tensors for new tensors.

    By default glibc returns large blocks to the system at once. For new blocks, the system must find and
    clear pages, which takes up to a fifth of a step's time on the CPU. With this setting the process never
    shrinks. See ``mallopt(3)``; the numbers come from glibc's ``malloc.h``.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_max = -1, -4
        mallopt(trim_threshold, -1)  # never shrink the heap
        mallopt(mmap_max, 0)  # take all memory from the heap


def other_accelerator():
    """The kind of this machine's accelerator, such as ``xpu`` or ``npu``; ``cpu`` if there is none, or if it
    is CUDA or MPS."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None or device.type in ("cuda", "mps") else device.type


class Runtime:
    """The device of this process, its numeric precision and its place among the processes.

    Args:
        device: ``cpu``, ``cuda``, ``mps``, ``xla``, the kind of another accelerator that PyTorch supports, or
            ``auto``: CUDA if available, else MPS, else another accelerator, else the CPU.
        amp: run the networks' forward passes under autocast.
        amp_dtype: ``bf16``, or ``fp16`` with gradient scaling (CUDA only).
        channels_last: keep images and filters in the memory order in which convolutions are fastest.
        sync_bn: batch norm computes its statistics over the batches of all processes.
        compiled: training passes go through ``torch.compile``.
        graphed: training steps are replayed as a CUDA graph; ignored without CUDA.
        alone: this process does not take part in the process group that torchrun started.

    Raises:
        UserError: the device is not available, it lacks the precision, or there is no compiler.

    ``torchrun`` starts one process per GPU (NCCL) or per rank on CPU (gloo), with its own ``rank`` of
    ``world_size``. A process started alone is rank 0 of 1.

    On XLA all devices run one SPMD program: batches are sharded over a mesh with the single axis ``data``,
    and XLA turns sums over a batch, such as batch statistics, into sums over all devices. Every host runs the
    same program on the same batches, so ``world_size`` is 1. Through a gloo group the hosts agree on the
    checkpoint to read and on when to stop. The first host writes the files.
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
        self.host, self.hosts = 0, 1  # hosts that run XLA's single program
        self.rank = 0 if alone else int(os.environ.get("RANK", 0))
        self.world_size = 1 if alone else int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device(device)
        if device not in ("cpu", "mps", "xla"):  # there may be several
            self.device = torch.device(device, local_rank)
            torch.accelerator.set_device_index(local_rank)
        if device == "cuda":
            torch.backends.cudnn.benchmark = True  # shapes are static, so that one search is enough
            torch.backends.cuda.matmul.fp32_precision = "tf32"  # the default for convolutions
        if device == "xla":
            self._start_xla()
        elif self.world_size > 1 and not dist.is_initialized():
            self._join_processes()
        self.configure(amp, amp_dtype, channels_last, sync_bn, compiled, graphed)

    @classmethod
    def best(cls):
        """The kind of device that ``auto`` selects on this machine."""
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
        """Set the constructor's options from ``amp`` on; call it before any network is placed."""
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
            print(f"--cuda-graph needs CUDA and is ignored on {self.kind}", file=sys.stderr)
        if compiled:
            # dropout must draw the same as without compiling: the feedback repeats the student's pass
            torch._inductor.config.fallback_random = True
            # a leaky ReLU's gradient reads six tensors; above the threshold (default 4) it is stored first
            torch._inductor.config.realize_reads_threshold = 8
        self.amp_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp_dtype] if amp else None
        if self.amp_dtype == torch.bfloat16 and not self._has_bf16():
            self.amp_dtype = None
            if self.is_main and not self.alone:
                print(f"this {self.kind} device has no bf16: computing in float32", file=sys.stderr)

    def _join_processes(self):
        """Form the process group.

        If torchrun restarts processes on one machine, its store still has the addresses of the dead
        processes. Therefore each attempt uses its own prefix in the store. Several machines count attempts
        differently; with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 each attempt has its own store instead.
        """
        store, rank, world_size = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend = dist.get_default_backend_for_device(self.kind)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)

    def _start_xla(self):
        if self.world_size > 1:
            raise UserError("--device xla runs one process per host: start it without torchrun")
        # otherwise a number 0 or 1 becomes a constant of the graph, which is then compiled again
        os.environ.setdefault("XLA_NO_SPECIAL_SCALARS", "1")
        try:
            import torch_xla
            import torch_xla.distributed.spmd as spmd
            import torch_xla.runtime as xla_runtime
        except ImportError as error:
            raise UserError(
                "--device xla needs torch_xla and its version of torch: pip install -r requirements-xla.txt"
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
        """True in the process that prints and writes files."""
        return self.rank == 0 and self.host == 0

    @property
    def processes(self):
        """The number of processes that run this program: XLA's hosts, or processes that share the batch."""
        return max(self.world_size, self.hosts)

    @property
    def static(self):
        """True if shapes should be static and no branch should depend on data: on all devices but the CPU."""
        return self.kind != "cpu"

    def describe(self):
        """The device in words, for messages and summary.json."""
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
        if platform.machine() in ("x86_64", "AMD64"):  # some emulate bf16, which is slow
            checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            return any(getattr(torch.cpu, check, bool)() for check in checks)
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def place(self, network):
        """Move the network to the device, in the chosen memory order; images follow the order of its
        filters."""
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
        """Wrap a placed network for training passes, so that ``backward`` averages gradients over all
        processes; returns the network itself if there is one process and no compiling."""
        training = network
        if self.world_size > 1:
            devices = None if self.kind == "cpu" else [self.device]
            # each process keeps its own running statistics until they are averaged for evaluation
            training = DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)
        return self.compile(training)

    def compile(self, function):
        """The function or network, passed through ``torch.compile`` with ``compiled``; shapes are static."""
        return torch.compile(function, dynamic=False) if self.compiled else function

    def uncompiled(self):
        """Context without compiling: a compiled graph allows only one backward pass."""
        return torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()

    def no_sync(self, network):
        """Context in which ``backward`` adds up gradients in this process without averaging over processes:
        for all micro-batches but the last. ``network`` is a result of ``parallel``."""
        return network.no_sync() if self.world_size > 1 else contextlib.nullcontext()

    def shard(self, tensors):
        """XLA: split each tensor of the tuple over the devices, along its first dimension; returns the tuple.

        A tensor whose length is no multiple of the number of devices stays whole on each device.
        """
        if self.kind == "xla":
            for tensor in tensors:
                if tensor is not None and len(tensor) % self.num_devices == 0:
                    self.spmd.mark_sharding(tensor, self.mesh, ("data", *[None] * (tensor.ndim - 1)))
        return tensors

    def replicate(self, tensors):
        """XLA: declare that each device holds the whole of each tensor, as it does after a step anyway."""
        if self.kind == "xla":
            for tensor in tensors:
                self.spmd.mark_sharding(tensor, self.mesh, (None,) * tensor.ndim)

    def graph(self, function, *generators):
        """The training step ``function``, (batch, step) → {name: () tensor}; with ``graphed`` a
        ``StepGraph``."""
        return StepGraph(self, function, generators) if self.graphed else function

    def number(self, function, step):
        """``function(step)``, a number that changes from step to step.

        In a captured step it is a float32 () tensor, which each replay sets to the number of its step. With
        ``graphed``, steps outside of the graph round the number to float32 to match replayed steps.
        """
        if self.capturing:
            return self.capturing.number(function)
        return float(np.float32(function(step))) if self.graphed else function(step)

    def scalar(self, value):
        """A number that changes from step to step, for arithmetic with tensors.

        On XLA it is a tensor: equal Python numbers share one input of a graph, so that XLA would compile
        another graph for a step in which two numbers happen to be equal.
        """
        return torch.tensor([value]).to(self.device)[0] if self.kind == "xla" else value

    def finish_step(self):
        """Call at the end of a training step or evaluation batch: XLA compiles and runs the recorded
        operations."""
        if self.kind == "xla":
            self.xla.sync()

    def zeros(self, *shape):
        """Float32 zeros on the device.

        On XLA they are copied from the CPU: ``torch.zeros`` would become part of the next graph and make it
        differ from the graph of a later step.
        """
        return self.put(torch.zeros(shape, device="cpu" if self.kind == "xla" else self.device))

    def put(self, tensor):
        """The tensor on the device; on XLA, the whole tensor on each device."""
        tensor = tensor.to(self.device)
        self.replicate([tensor])
        return tensor

    def wait(self):
        """Wait until the device has finished all its work: for measuring time."""
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
        """Context in which float32 products keep all 24 bits: for differences of close values."""
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
        """The tensors of all processes, of the same shape, concatenated along the first dimension."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    def all_reduce_max_int(self, number):
        """The largest ``number`` of all processes, as a () tensor; all processes must call this. Reading the
        tensor waits for the other processes."""
        device = "cpu" if self.kind == "xla" else self.device
        tensor = torch.tensor(number, device=device)
        if self.processes > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    @contextlib.contextmanager
    def local_main_first(self):
        """Context that one process of each machine runs before the other processes: for a download, say.

        If this process raises a UserError, the other processes end silently with the same exit status.
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
        """Call ``function()`` in the main process; returns its result in all processes.

        If it raises an exception, the other processes end silently with the same exit status.
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
        """Leave the process group at the end of a command. Not after an error, when it could wait for other
        processes forever."""
        if self.processes > 1:
            dist.destroy_process_group()

    # random state

    def generator(self, seed):
        """A seeded ``torch.Generator`` on the device; on the host for XLA, which has no generators."""
        device = "cpu" if self.kind == "xla" else self.device
        return torch.Generator(device=device).manual_seed(seed)

    def seed(self, *key):
        """Seed the default random generators, which dropout draws from, by a key of integers.

        Each process gets its own random numbers. A run seeds each step with the number of the step, so that
        it can continue with the same random numbers without a stored state.
        """
        seed = int(np.random.SeedSequence((*key, self.rank)).generate_state(1)[0])
        if self.kind not in ("cpu", "xla"):
            torch.manual_seed(seed)
        else:  # torch.manual_seed would look for other devices, which takes longer than a small operation
            torch.default_generator.manual_seed(seed)
        if self.kind == "xla":
            self.xla.manual_seed(seed)

    def rng_state(self):
        """State of the default random generators, which dropout draws from; does not wait for the device.

        Empty while a step is captured: the state cannot be read then, and ``replay`` is not used.
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
        """Context that draws the random numbers (dropout masks) drawn since ``state`` again; with None it
        draws new ones.

        Raises:
            UserError: random numbers were drawn, and a CUDA graph, which cannot repeat them, is in use.
        """
        if state is None:
            yield
            return
        now = self.rng_state()
        if self.graphed and any(not torch.equal(state[name], now[name]) for name in state):
            raise UserError(
                "--cuda-graph cannot draw the same dropout twice in a step, as --feedback exact and "
                "--accumulate do: leave out --cuda-graph, or the dropout"
            )
        self.set_rng_state(state)
        try:
            yield
        finally:
            self.set_rng_state(now)

    # files

    def save(self, state, *paths):
        """Write ``state`` to each path; a crash at any moment leaves either the old or the new file whole.

        The state is copied from the device once, and the files are written one after the other. Only the main
        process writes; all processes return when the files are written.
        """

        def write():
            content = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().cpu(), state)
            for path in paths:
                write_atomically(path, lambda file: torch.save(content, file))

        self.on_main(write)

    def load(self, path):
        """Read a file that ``save`` wrote, onto the CPU. Never runs code from the file (``weights_only``).

        The main process reads the file and sends the content to the other processes, whose machines may not
        have it.

        Raises:
            UserError: no such file, or not a readable checkpoint.
        """
        return self.on_main(lambda: read_content(path))
