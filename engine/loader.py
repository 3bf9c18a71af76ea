"""How images reach the device: batches for training without end, and one pass over a set for evaluation.

``TrainLoader`` yields a ``Batch`` per step; ``batches`` walks through a set once, in order. A set in memory
lies on the device as one tensor and a batch is an ``index_select`` there. Files are decoded by DataLoader
workers, straight to uint8 crops. Both ways the n-th image of a run depends on the seed and on n alone: not on
the number of workers, nor on whether the run was resumed.

The file follows an image backwards: the order in which images are drawn, the training batches, the batches of
an evaluation, the workers that decode. What they decode of a file is in ``engine/images.py``.
"""

import math
import signal
import sys
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from engine.images import DECODING_ERRORS, REPAIR, ImageSet, cannot_read, read_image
from utils import UserError

CHUNK = 32  # images that a worker decodes at a time: large batches are spread over the workers


class Batch(NamedTuple):
    """One training batch on the device; B labelled images and N = mu * B unlabelled ones.

    ``indices_u`` lies where the unlabelled set does, so that its rows are found without a wait: on the device
    for a set in memory, on the host for files.
    """

    images_l: torch.Tensor  # (B, 3, H, W) uint8; two moons: (B, 2) float32
    targets: torch.Tensor  # (B,) int64
    images_u: torch.Tensor | None  # (N, 3, H, W) uint8; None when mu is 0
    targets_u: torch.Tensor | None  # (N,) int64, -1 where unknown, None if all are: for metrics alone
    indices_u: torch.Tensor | None  # (N,) int64, positions of these images in the unlabelled set


# ---------------------------------------------------------------------------------------- the order of images


def _random(*key):
    """A numpy Generator for a key of integers, 0 or more; different keys give independent streams."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def to_device(array, device):
    """An array or tensor on the device, copied without the host waiting for it."""
    tensor = torch.as_tensor(array)
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


LABELED, UNLABELED, CROPS, AUGMENTATION = range(4)  # the first integer of every random key: what it is for


class _Stream:
    """An endless sequence of positions in a set of n images: one shuffle of the set after another.

    Entry p is entry p % n of the permutation of epoch p // n, which is drawn from (name, seed, epoch) alone.
    Permutations are drawn for at least ``ahead`` entries at a time, so that few copies go to the device.
    """

    def __init__(self, n, name, seed, ahead, device):
        self.n, self.name, self.seed, self.device = n, name, seed, device
        self.epochs = max(1, math.ceil(ahead / n))
        self.block, self.entries = None, None

    def take(self, start, count):
        """(count,) int64 on the device: entries start to start + count - 1."""
        length = self.epochs * self.n
        parts = []
        while count > 0:
            block, offset = divmod(start, length)
            if block != self.block:
                self.block, self.entries = block, to_device(self._permutations(block), self.device)
            parts.append(self.entries[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _permutations(self, block):
        epochs = range(block * self.epochs, (block + 1) * self.epochs)
        return np.concatenate([_random(self.name, self.seed, epoch).permutation(self.n) for epoch in epochs])


class _Share(NamedTuple):
    """The part of a stream that one process takes: ``count`` entries of every step."""

    name: int  # LABELED or UNLABELED
    image_set: ImageSet
    stream: _Stream
    count: int
    rank: int
    world_size: int

    def first(self, step):
        """The first entry of a step."""
        return (step * self.world_size + self.rank) * self.count

    def take(self, step):
        """(count,) int64: positions in the set."""
        return self.stream.take(self.first(step), self.count)


def _endless_requests(shares, seed, step):
    """Chunks of requests for all steps from this one on, in the order in which they are gathered.

    A function and not a method: if the workers' iterator held a reference to the loader, the workers would
    live on after it until the next garbage collection.
    """
    while True:
        for share in shares:
            positions, first = share.take(step).tolist(), share.first(step)
            files = [share.image_set.files[i] for i in positions]
            keys = [(CROPS, seed, share.name, first + k) for k in range(share.count)]
            yield from _chunks(list(zip(files, positions, keys, strict=True)))
        step += 1


# --------------------------------------------------------------------------------------------------- training


class TrainLoader:
    """Endless iterator over training batches: a ``Batch`` on ``runtime.device`` per step.

    Args:
        dataset: ``Dataset``.
        batch_size: B, labelled images per process and step.
        mu: unlabelled images per labelled one; with 0, what a batch says of them is None.
        seed: of the order, of the crops and of ``generator``.
        runtime: ``Runtime``.
        workers: DataLoader processes that decode files; not used for sets in memory.

    All processes draw from the same shuffle: in step t, process r of W takes entries (t W + r) B to
    (t W + r + 1) B - 1 of the labelled stream, and in the same way mu B entries of the unlabelled one.

    Attributes:
        position: steps drawn so far.
        generator: ``torch.Generator`` on the device for augmenting the latest batch, seeded from (seed, step,
            rank), so that continuing a run needs no stored random state.

    Raises (when a batch is drawn):
        UserError: an image cannot be decoded. If the set skips such images, or has an ``on_unreadable``,
            another image of the batch takes its place instead.
    """

    def __init__(self, dataset, batch_size, mu, seed, runtime, workers=2):
        self.seed, self.rank, self.workers, self.device = seed, runtime.rank, workers, runtime.device
        self.generator = runtime.generator(seed)
        self.position = 0
        self.in_memory = dataset.labeled.in_memory
        home = self.device if self.in_memory else torch.device("cpu")
        self.shares = []
        for name, image_set, count in (
            (LABELED, dataset.labeled, batch_size),
            (UNLABELED, dataset.unlabeled, mu * batch_size),
        ):
            if count:
                # XLA compiles a graph anew for every offset that it slices at: the host slices instead
                slicing = torch.device("cpu") if self.device.type == "xla" else home
                stream = _Stream(len(image_set), name, seed, 16 * count * runtime.world_size, slicing)
                share = _Share(name, image_set.to(home), stream, count, runtime.rank, runtime.world_size)
                self.shares.append(share)
        self.truth_known = bool((dataset.unlabeled.targets >= 0).any())  # the class of an unlabelled image
        self.decoded = None  # iterator over what the workers decode; started by the first batch
        self.skipped = set()  # messages about unreadable files, each printed once
        self.before = {}  # images and positions of each share in the latest batch of files

    def __iter__(self):
        return self

    def __next__(self):
        step = self.position
        key = np.random.SeedSequence((AUGMENTATION, self.seed, step, self.rank))
        self.generator.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        parts = self._from_memory(step) if self.in_memory else self._from_disk(step)
        self.position = step + 1
        images_l, targets, _ = parts[0]
        batch = Batch(images_l, targets, *(parts[1] if len(parts) > 1 else (None, None, None)))
        return batch if self.truth_known else batch._replace(targets_u=None)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]
        self.decoded = None  # workers start again, from the new position

    def _from_memory(self, step):
        """Images, targets and positions of each share."""
        parts = []
        for share in self.shares:
            index, image_set = share.take(step).to(self.device), share.image_set
            parts.append((image_set.images.index_select(0, index), image_set.targets[index], index))
        return parts

    def _from_disk(self, step):
        """Images, targets and positions of each share."""
        if self.decoded is None:
            ahead = sum(math.ceil(share.count / CHUNK) for share in self.shares)
            requests = _endless_requests(self.shares, self.seed, step)
            image_set = self.shares[0].image_set
            reader = _Reader(image_set.size, "none", image_set.reading)
            self.decoded = _decode(requests, reader, self.workers, self.device, ahead)
        parts = []
        for share in self.shares:
            images, positions, unreadable = _gather(self.decoded, share.count, self.device)
            if unreadable:
                try:
                    images, positions = self._replaced(images, positions, unreadable, share)
                except UserError:
                    self.decoded = None  # stops the workers now, not when the traceback is collected
                    raise
            self.before[share.name] = images, positions
            parts.append((images, to_device(share.image_set.targets[positions], self.device), positions))
        return parts

    def _replaced(self, images, positions, unreadable, share):
        """Images and positions with each unreadable image replaced by another one of the same batch; where
        there is none, the batch before until the run has stopped."""
        _stop_or_skip(unreadable, share.image_set, self.skipped)
        bad = [i for i, _ in unreadable]
        good = sorted(set(range(len(images))) - set(bad))
        if not good:
            sentence = f"no image of a batch can be read: {unreadable[0][1]}"
            if share.name not in self.before:
                raise UserError(sentence)
            _stop(sentence, share.image_set)
            return self.before[share.name]
        index = torch.arange(len(images))
        index[bad] = torch.tensor([good[k % len(good)] for k in range(len(bad))])
        return images[index.to(images.device)], positions[index]


# ------------------------------------------------------------------------------------------------- evaluation


def share_of(image_set, rank, world_size):
    """The first position, and the last one + 1, of the part of a set that a process takes."""
    return rank * len(image_set) // world_size, (rank + 1) * len(image_set) // world_size


def batches(image_set, batch_size, device, rank=0, world_size=1):
    """Walk through a set once, in order: iterator of (images, targets, mask) on the device.

    Args:
        batch_size: B, the size of every batch; the last one is padded.
        rank, world_size: this process and how many there are. Each process takes a contiguous part of the
            set, and all of them get the same number of batches.

    Yields:
        images (B, 3, H, W) uint8 or (B, 2) float32; targets (B,) int64; mask (B,) float32, 1 for images of
        the set, 0 for padding (zeros, target 0) and for files that were skipped.

    Raises:
        UserError: an image cannot be decoded, and the set neither skips such images nor has an
            ``on_unreadable``.
    """
    device = torch.device(device)
    start, stop = share_of(image_set, rank, world_size)
    steps = math.ceil(math.ceil(len(image_set) / world_size) / batch_size)
    limits = [
        (min(first, stop), min(first + batch_size, stop))
        for first in range(start, start + steps * batch_size, batch_size)
    ]
    if not image_set.in_memory:
        yield from _batches_from_disk(image_set, limits, batch_size, device)
        return
    for first, last in limits:
        images = image_set.images[first:last].to(device)
        targets = image_set.targets[first:last].to(device)
        mask = torch.ones(last - first, device=device)
        yield tuple(_padded(tensor, batch_size) for tensor in (images, targets, mask))


def _batches_from_disk(image_set, limits, batch_size, device):
    """``batches`` for a set of files; ``limits`` are the first and last position + 1 of every batch."""
    chunks = (
        chunk
        for first, last in limits
        for chunk in _chunks([(image_set.files[i], i, None) for i in range(first, last)])
    )
    ahead = math.ceil(batch_size / CHUNK)
    reader = _Reader(image_set.size, image_set.crop, image_set.reading)
    decoded = _decode(chunks, reader, image_set.workers, device, ahead)
    skipped = set()
    try:
        for first, last in limits:
            mask = torch.ones(last - first)
            if first == last:  # no images left for this process, while another one still has some
                images = torch.zeros(0, 3, image_set.size, image_set.size, dtype=torch.uint8, device=device)
                truth = torch.zeros(0, dtype=torch.int64, device=device)
            else:
                images, positions, unreadable = _gather(decoded, last - first, device)
                truth = to_device(image_set.targets[positions], device)
                _stop_or_skip(unreadable, image_set, skipped)
                mask[[i for i, _ in unreadable]] = 0
            yield tuple(_padded(tensor, batch_size) for tensor in (images, truth, mask.to(device)))
    finally:
        del decoded  # stops the workers now, even if an exception keeps this frame alive


def _padded(tensor, length):
    """The tensor with zeros appended along its first dimension."""
    if len(tensor) == length:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])


# ---------------------------------------------------------------------------------------- decoding by workers


class _Reader:
    """The data set of the workers: decodes lists of requests, each (path, position, random key or None)."""

    def __init__(self, size, crop, reading):
        self.size, self.crop, self.reading = size, crop, reading

    def __getitems__(self, requests):
        """Images (n, 3, size, size) uint8, positions in the set (n,) int64, and a list of (index among them,
        message) for files that cannot be read."""
        images = torch.zeros(len(requests), 3, self.size, self.size, dtype=torch.uint8)
        images = images.contiguous(memory_format=torch.channels_last)  # as they are decoded
        unreadable = []
        for i, (path, _, key) in enumerate(requests):
            try:
                images[i] = read_image(path, self.size, self.crop, key and _random(*key), self.reading)
            except DECODING_ERRORS as error:
                unreadable.append((i, cannot_read(path, error)))
        return images, torch.tensor([position for _, position, _ in requests]), unreadable


def _chunks(requests):
    """A list of requests in chunks of at most CHUNK."""
    return [requests[i : i + CHUNK] for i in range(0, len(requests), CHUNK)]


def _unchanged(sample):
    return sample


def _leave_signals_to_parent(_):
    """Ctrl-C and SIGTERM may reach the whole process group. Workers ignore them: the main process still needs
    them to finish its step. So SIGTERM does not end them either where it comes from Python's own exit, which
    would wait for them for ever: ``script.execute`` kills them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _decode(chunks, reader, workers, device, ahead):
    """Iterator over what a ``_Reader`` returns for each chunk; ``ahead`` chunks or more are decoded ahead."""
    return iter(
        torch.utils.data.DataLoader(
            reader,
            batch_sampler=chunks,
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=max(2, math.ceil(ahead / workers)) if workers else None,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # so that starting workers does not advance the global generator
        )
    )


def _gather(decoded, count, device):
    """The next ``count`` decoded images, on the device, their positions, on the host, and a list of
    (index among them, message) for files that cannot be read."""
    images, positions, unreadable = [], [], []
    for start in range(0, count, CHUNK):
        some_images, some_positions, some_unreadable = next(decoded)
        images.append(some_images.to(device, non_blocking=True))
        positions.append(some_positions)
        unreadable += [(start + i, message) for i, message in some_unreadable]
    return torch.cat(images).contiguous(), torch.cat(positions), unreadable


def _stop(sentence, image_set):
    """UserError, or whatever the set does instead."""
    if image_set.on_unreadable is None:
        raise UserError(sentence)
    image_set.on_unreadable(sentence)


def _stop_or_skip(unreadable, image_set, skipped):
    """``_stop`` for unreadable files or, if the set skips such files, one line for each new one.

    Args:
        unreadable: list of (index in the batch, message).
        skipped: set of the messages printed so far; grows.
    """
    for _, message in unreadable:
        if not image_set.skip_unreadable:
            _stop(f"{message}: {REPAIR}", image_set)
        elif message not in skipped:
            skipped.add(message)
            tqdm.write(f"skipped, {len(skipped)} so far: {message}", file=sys.stderr)  # above a bar
