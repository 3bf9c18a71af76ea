"""Where this process runs: device, precision, processes, random state, files on disk.

Everything that differs between one CPU, one GPU and several processes is here, so that the rest of the
program reads as if there were one device. ``Runtime`` is made once, in ``main.py``, and handed down.
"""

import contextlib
import os
import pickle
import platform
import sys
import zipfile

import torch
import torch.distributed as dist


class UserError(Exception):
    """Something the user can put right: shown as one sentence, without a traceback, exit status 2."""


class Runtime:
    """The device of this process, its numeric precision and its place among the processes.

    Args:
        device: ``auto`` (CUDA where there is one, else CPU), ``cpu`` or ``cuda``.
        amp: run the networks' forward passes under autocast.
        amp_dtype: ``bf16``, or ``fp16`` with gradient scaling (CUDA only).
        channels_last: keep images and filters in the memory order that convolutions are fastest in.

    Raises:
        UserError: a device that is not there, or a precision that it does not have.

    Started by ``torchrun`` there is one process per GPU (or per ``gloo`` rank on CPU); ``rank`` and
    ``world_size`` tell them apart. A process started alone is rank 0 of 1.
    """

    def __init__(self, device="auto", amp=False, amp_dtype="bf16", channels_last=False):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device not in ("cpu", "cuda"):
            raise UserError(f"device '{device}' is not known: use auto, cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda, but PyTorch sees no CUDA device here: use --device cpu or auto")
        if amp and amp_dtype == "fp16" and device == "cpu":
            raise UserError("--amp-dtype fp16 needs CUDA: use --amp-dtype bf16 on the CPU")

        self.kind = device
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cudnn.benchmark = True  # shapes are static: the search pays once
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        self.channels_last = channels_last
        self.amp_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp_dtype] if amp else None
        if self.amp_dtype == torch.bfloat16 and not self._has_bf16():
            self.amp_dtype = None
            if self.is_main:
                print(f"this {self.kind} device has no bf16: --amp is left out", file=sys.stderr)

    @property
    def is_main(self):
        """True in the one process that prints and writes files."""
        return self.rank == 0

    def describe(self):
        """The device in words, for people and for summary.json."""
        name = torch.cuda.get_device_name(self.device) if self.kind == "cuda" else f"{os.cpu_count()} cores"
        return f"{self.world_size} × {self.kind} ({name})" if self.world_size > 1 else f"{self.kind} ({name})"

    def _has_bf16(self):
        if self.kind == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        if platform.machine() in ("x86_64", "AMD64"):  # others than these emulate it, slower than float32
            checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
            return any(getattr(torch.cpu, check, bool)() for check in checks)
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def place(self, network):
        """The network on the device, in the chosen memory order; images follow the order of the filters."""
        memory_format = torch.channels_last if self.channels_last else torch.preserve_format
        return network.to(self.device, memory_format=memory_format)

    def wait(self):
        """Until the device has done all that it was asked to: for measuring time."""
        if self.kind == "cuda":
            torch.cuda.synchronize(self.device)

    # precision

    def autocast(self, scaled=True):
        """Context in which matrix products and convolutions run in the chosen precision.

        Gradients that no scaler protects (``scaled=False``) are not computed in fp16, where they would
        vanish, but in float32.
        """
        enabled = self.amp_dtype is not None and (scaled or self.amp_dtype != torch.float16)
        return torch.autocast(self.kind, dtype=self.amp_dtype, enabled=enabled)

    def grad_scaler(self):
        """A gradient scaler, active for fp16 only: bf16 has the range of float32."""
        return torch.amp.GradScaler(self.kind, enabled=self.amp_dtype == torch.float16)

    # processes

    def average_(self, tensors):
        """Replace each tensor of the list, in place, by its mean over all processes; returns the list."""
        if self.world_size > 1:
            flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
            dist.all_reduce(flat)
            flat /= self.world_size
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))
        return tensors

    def sum_(self, tensor):
        """Replace the tensor, in place, by its sum over all processes; returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def close(self):
        if self.world_size > 1:
            dist.destroy_process_group()

    # random state

    def generator(self, seed):
        """A ``torch.Generator`` on the device, seeded."""
        return torch.Generator(device=self.device).manual_seed(seed)

    def rng_state(self):
        """State of the default random generators, which dropout draws from; no wait for the device."""
        state = {"cpu": torch.get_rng_state()}
        if self.kind == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_rng_state(self, state):
        """Continue from ``rng_state()``; a state of another kind of device is left out."""
        torch.set_rng_state(state["cpu"].cpu())
        if self.kind == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)

    @contextlib.contextmanager
    def replay(self, state):
        """Context that draws the random numbers (the dropout masks) drawn after ``state`` once more."""
        now = self.rng_state()
        self.set_rng_state(state)
        try:
            yield
        finally:
            self.set_rng_state(now)

    # files

    def save(self, state, path):
        """Write ``state`` to ``path`` so that a crash at any moment leaves the old file or the new one whole.

        Only the main process writes. Temporary file, flush to disk, rename, flush of the folder.
        """
        if not self.is_main:
            return
        temporary = f"{path}.tmp"
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise UserError(f"cannot write the checkpoint {path}: {error.strerror or error}") from error

    def load(self, path):
        """Read what ``save`` wrote, onto the CPU. Never runs code from the file (``weights_only``).

        Raises:
            UserError: no such file, or not a readable checkpoint.
        """
        if not os.path.isfile(path):
            raise UserError(f"there is no checkpoint {path}")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (
            pickle.UnpicklingError,
            RuntimeError,
            EOFError,
            zipfile.BadZipFile,
            ValueError,
            KeyError,
        ) as error:
            raise UserError(
                f"{path} is damaged or was not written by this program: nothing could be loaded from it"
            ) from error
