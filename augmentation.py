"""Weak and strong views of whole batches on their device: flip, crop, RandAugment, cutout, mixup.

uint8 images go in, normalised float32 views come out:

    views = ImageViews(32, mean, std)            # CIFAR; ImageNet: ImageViews(224, mean, std, crop="none")
    labeled, targets, weak, strong, _ = views(images_l, targets, images_u, generator)

Each image draws its own operations, but operations are computed for whole batches: as lookup tables of grey
levels, blends of two images, maps of source positions, or masks. Each operation of RandAugment is one row of
TABLE, which names its kind.

Every pixel equals Pillow's, rounding included. The arguments of the operations come from the code published
with *Meta Pseudo Labels* (Pham et al., CVPR 2021), which follows *RandAugment* (Cubuk et al., 2020).

Random numbers come from the ``torch.Generator`` that is passed in, on the device or on the host (None:
torch's default generator), so that a seed fixes the views and a restored state continues them. The random
numbers of mixup come from a seed and the number of the step, so that all processes draw the same.
"""

import contextlib
import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

GREY = 128  # level of empty pixels (outside of the image, cutouts); see ``fill_level``


class Views(NamedTuple):
    """The inputs of a training step: the same fields for images and for points.

    labeled: (B, C, H, W) float32, normalised. targets: (B,) int64, classes. weak, strong: (N, C, H, W)
    float32, two views of the same N unlabelled images; None without unlabelled images, and strong is None if
    no strong view is needed. Points have the shape (B, 2) and (N, 2) instead. After ``mixup``, targets are
    class distributions, (B, K) float32. indices: ``indices_u`` of the ``Batch``, or None.
    """

    labeled: torch.Tensor
    targets: torch.Tensor
    weak: torch.Tensor | None
    strong: torch.Tensor | None
    indices: torch.Tensor | None = None


@contextlib.contextmanager
def one_thread(images):
    """Context in which a CPU computes with one thread: operations on a batch of ``images`` are too small to
    gain from more threads (two threads took 0.7 times as long as one on one machine, 1.8 times on
    another)."""
    threads = torch.get_num_threads()
    if images.device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _drawn(function, arguments, generator, device):
    """Random numbers on ``device``, drawn on the generator's device: for XLA, generators are on the host."""
    home = device if generator is None else generator.device
    return function(*arguments, generator=generator, device=home).to(device, non_blocking=True)


def fill_level(mean, std):
    """The level of empty pixels for images with this mean and std (of levels / 255): GREY, or the rounded
    mean if GREY is more than 5 standard deviations away from it in some channel, as in nearly black
    images."""
    if all(abs(GREY / 255 - m) <= 5 * s for m, s in zip(mean, std, strict=True)):
        return GREY
    return round(255 * sum(mean) / len(mean))


# ---------------------------------------------------------------------------- point operations: lookup tables


def lookup(images, tables):
    """Replace each grey level v of a channel by ``tables[image, channel, v]``.

    images: (N, C, H, W) uint8. tables: (N, C, 256) uint8, or anything that broadcasts to it.
    """
    n, channels = images.shape[:2]
    tables = tables.expand(n, channels, 256)
    return torch.gather(tables, 2, images.flatten(2).long()).view_as(images)


@lru_cache(maxsize=1)
def stretch_tables():
    """AutoContrast for every darkest and brightest level: (256 · 256, 256) uint8, row ``256 · low + high``.

    int(v · scale + offset) in float64, as in Pillow. If the exact result is a whole number, rounding decides
    between two levels. Devices round differently (some have no float64, some fuse multiplication and
    addition), so the table is computed once, on the CPU. NumPy takes a tenth of a second. PyTorch's threads
    wait for each other a thousand times, which took up to 15 seconds while another program used a core.
    """
    level = np.arange(256.0)
    tables = np.empty((256, 256, 256), np.uint8)
    tables[:] = np.arange(256)  # rows of images with a single level: unchanged
    for low in range(255):
        scale = 255.0 / (level[low + 1 :, None] - low)
        stretched = level * scale
        stretched += -low * scale
        tables[low, low + 1 :] = stretched.clip(0, 255)
    return torch.from_numpy(tables).flatten(0, 1)


def autocontrast_tables(images, _, stretch):
    """(N, C, 256) uint8: the darkest level of each channel becomes 0 and the brightest 255."""
    channels = images.flatten(2)
    row = channels.amin(2).long() * 256 + channels.amax(2)
    return stretch.index_select(0, row.flatten()).view(*row.shape, 256)


def equalize_tables(images, *_):
    """(N, C, 256) uint8: levels spread to be about equally frequent (Pillow's integer rule)."""
    n, channels, height, width = images.shape
    levels = images.flatten(2).long()
    ones = torch.ones((), dtype=torch.int32, device=images.device).expand_as(levels)
    histogram = torch.zeros(n, channels, 256, dtype=torch.int32, device=images.device)
    histogram.scatter_add_(2, levels, ones)
    brightest = images.flatten(2).amax(2, keepdim=True).long()
    step = (height * width - histogram.gather(2, brightest)) // 255
    darker = histogram.cumsum(2, dtype=torch.int32) - histogram  # pixels below each level
    tables = ((darker + step // 2) // step.clamp(min=1)).clamp(max=255)
    identity = torch.arange(256, dtype=torch.int32, device=images.device)
    return torch.where(step > 0, tables, identity).to(torch.uint8)


def posterized(levels, bits):
    """Keep the highest bits: with 0 bits the image is black, with 8 or more it is unchanged."""
    return levels & ~(255 >> min(bits, 8))


def solarized(levels, threshold):
    return torch.where(levels < threshold, levels, 255 - levels)


def brightened(levels, factor):
    return blend(torch.zeros(256), levels.float(), factor)


# ---------------------------------------------------------- colour, contrast, sharpness: blends of two images


def blend(degenerate, levels, factor):
    """Pillow's blend: degenerate + factor · (image − degenerate), clipped to 0…255 and rounded down.

    Factor 1 gives the image, 0 the degenerate image, and above 1 moves away from it.
    degenerate,
    levels: float32 grey levels that broadcast to (N, C, H, W). Returns uint8.
    """
    blended = (levels - degenerate).mul_(factor).add_(degenerate).clamp_(0, 255)
    return blended.short().to(torch.uint8)  # four times faster on a CPU than from float32 directly


def luma(levels):
    """The grey image by Pillow's 16-bit weights (ITU-R 601-2): (N, 3, H, W) → (N, 1, H, W).

    float32 whole numbers in and out; all values in between are whole and below 2²⁴, so nothing is rounded.
    """
    red, green, blue = levels.split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471).add_(32768).mul_(1 / 65536).floor_()


def mean_level(grey):
    """The mean of a grey image, rounded half up: (N, 1, H, W) → (N, 1, 1, 1) float32, whole numbers."""
    count = grey[0].numel()
    return ((2 * grey.int().sum((2, 3), keepdim=True) + count) // (2 * count)).float()


def smooth(levels):
    """3×3 mean with the middle weighted 5 (Pillow's SMOOTH), rounded; border pixels stay as they are.

    levels: (N, C, H, W) float32, whole numbers. Images smaller than 3×3 are all border.
    """
    smoothed = levels.clone()
    if min(levels.shape[2:]) >= 3:
        rows = levels[:, :, :-2] + levels[:, :, 1:-1] + levels[:, :, 2:]
        box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
        middle = levels[:, :, 1:-1, 1:-1]
        smoothed[:, :, 1:-1, 1:-1] = box.add_(middle, alpha=4).div_(13).add_(0.5).floor_()
    return smoothed


# ------------------------------------------------------------ rotation, shear, translation: maps of positions


def warp(images, source, fill=GREY):
    """Move pixels: each new pixel comes from a position of the same image.

    images: (N, C, H, W) uint8. source: (N, H · W) int64, row · W + column of the pixel to take, or H · W for
    ``fill``.
    """
    pixels = F.pad(images.flatten(2), (0, 1), value=fill)
    index = source[:, None].expand(-1, images.shape[1], -1)
    return torch.gather(pixels, 2, index).view_as(images)


def affine_source(matrix, height, width):
    """Nearest-neighbour map of an affine transform: (H · W,) int64, H · W where the source is outside.

    matrix: (a, b, c, d, e, f); the output pixel with middle (x, y) = (column + ½, row + ½) comes from
    (a·x + b·y + c, d·x + e·y + f). As in Pillow, this is fixed-point arithmetic with 16 fractional bits, but
    floating-point arithmetic for a pure shift.
    """
    a, b, c, d, e, f = matrix
    row = torch.arange(height)[:, None]
    column = torch.arange(width)[None, :]
    if b == d == 0:
        x = (column + 0.5 + c).floor().long().expand(height, width)
        y = (row + 0.5 + f).floor().long().expand(height, width)
    else:

        def fixed(value):
            return math.floor(value * 65536 + 0.5)

        x = (fixed(c + a / 2 + b / 2) + column * fixed(a) + row * fixed(b)) >> 16
        y = (fixed(f + d / 2 + e / 2) + column * fixed(d) + row * fixed(e)) >> 16
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return torch.where(inside, y * width + x, height * width).flatten()


def rotation(degrees, height, width):
    """The matrix of a counter-clockwise rotation about the middle of the image."""
    angle = -math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


# --------------------------------------------------------------------------------------------- cutout: a mask


def erase(images, centre, half, fill=GREY):
    """Fill squares with the level ``fill``: rows and columns from centre − half to centre + half − 1.

    images: (N, C, H, W) uint8. centre: (N, 2) int64, row and column. half: int, or (N,) int64.
    """
    height, width = images.shape[2:]
    row, column = centre.unbind(1)
    inside = _near(row, half, height)[:, None, :, None] * _near(column, half, width)[:, None, None, :]
    return (images - fill).mul_(1 - inside).add_(fill)  # exact: uint8 arithmetic is modulo 256


def _near(middle, half, length):
    """(N,) positions → (N, length) uint8, 1 where middle − half ≤ position < middle + half."""
    position = torch.arange(length, device=middle.device)
    low, high = (middle - half)[:, None], (middle + half)[:, None]
    return ((position >= low) & (position < high)).to(torch.uint8)


# -------------------------------------------------------------------- RandAugment: its table of operations

# The kinds of operations, and the function in a row of this kind:
FIXED = "fixed table"  # (levels, argument) → new levels; both (256,), the same for every image
LOOKUP = "lookup table"  # (images, argument, stretch_tables) → (N, C, 256) uint8: tables made from each image
BLEND = "blend"  # (N, 3, H, W) float32 → the degenerate image, in whole numbers; the argument is the factor
GREY_BLEND = "blend of grey"  # the same, from the grey image: (N, 1, H, W) float32
WARP = "warp"  # (argument, height, width) → the matrix of affine_source; the sign of the argument is drawn
MASK = "mask"  # no function: an empty square, the argument is its half-width


class Operation(NamedTuple):
    """One row of the table.

    kind: one of the six kinds above. argument: (m, t, c) → number, or None for an operation without argument;
    m = magnitude / 10, t and c are the pixels of a translation and of a cutout at m = 1. unit: the argument's
    text in a picture. function: see the kinds.
    """

    name: str
    kind: str
    argument: Callable | None
    unit: str
    function: Callable | None


def enhancement(m, t, c):
    return 1.8 * m + 0.1


# A new row changes which operations each seed draws, and so the strong views of every run. Its argument also
# needs a line in tests/test_augmentation.py.
TABLE = (
    Operation("AutoContrast", LOOKUP, None, "no argument", autocontrast_tables),
    Operation("Equalize", LOOKUP, None, "no argument", equalize_tables),
    Operation("Invert", FIXED, None, "no argument", lambda levels, _: 255 - levels),
    Operation("Rotate", WARP, lambda m, t, c: 30 * m, "{:.0f}°", rotation),
    Operation("Posterize", FIXED, lambda m, t, c: int(4 * m), "{} bits", posterized),
    # The published cast to uint8 takes the threshold modulo 256.
    Operation("Solarize", FIXED, lambda m, t, c: int(256 * m) % 256, "from level {}", solarized),
    Operation("Color", GREY_BLEND, enhancement, "factor {:.2f}", lambda grey: grey),
    Operation("Contrast", GREY_BLEND, enhancement, "factor {:.2f}", mean_level),
    Operation("Brightness", FIXED, enhancement, "factor {:.2f}", brightened),
    Operation("Sharpness", BLEND, enhancement, "factor {:.2f}", smooth),
    # Shears keep the top-left corner in its place, as published.
    Operation("ShearX", WARP, lambda m, t, c: 0.3 * m, "{:.2f} px per px", lambda x, *_: (1, x, 0, 0, 1, 0)),
    Operation("ShearY", WARP, lambda m, t, c: 0.3 * m, "{:.2f} px per px", lambda y, *_: (1, 0, 0, y, 1, 0)),
    Operation("TranslateX", WARP, lambda m, t, c: t * m, "{:.1f} px", lambda x, *_: (1, 0, x, 0, 1, 0)),
    Operation("TranslateY", WARP, lambda m, t, c: t * m, "{:.1f} px", lambda y, *_: (1, 0, 0, 0, 1, y)),
    Operation("Cutout", MASK, lambda m, t, c: int(c * m), "half-width {} px", None),
)
OPERATIONS = tuple(row.name for row in TABLE)
UNCHANGED = len(TABLE)  # the drawn number if a layer leaves an image unchanged


class Draws(NamedTuple):
    """The random choices of L RandAugment layers for N images.

    operation: (L, N) int64, row of TABLE, or UNCHANGED. negative: (L, N) bool, the sign of a warp's argument.
    centre: (L, N, 2) int64, row and column of the middle of a cutout, in pixels.
    """

    operation: torch.Tensor
    negative: torch.Tensor
    centre: torch.Tensor


# ---------------------------------------------------------------------------- RandAugment: its random layers


def by_kind(kind, kinds, function, *tensors):
    """Call a function for each kind of image; returns the results in the order of the images.

    kind: (N,) int64, below ``kinds``. tensors: N rows each; ``function(k, *rows)`` gets the rows of kind k
        and returns one row for each of them.
    """
    order = kind.argsort()
    sizes = kind.bincount(minlength=kinds).tolist()
    groups = zip(*(tensor.index_select(0, order).split(sizes) for tensor in tensors), strict=True)
    results = [function(k, *rows) for k, (rows, size) in enumerate(zip(groups, sizes, strict=True)) if size]
    return torch.cat(results).index_select(0, order.argsort())


class RandAugment:
    """Layers of one random operation each, drawn separately for every image of a batch.

    An image draws p ~ U(0.2, 0.8); each layer then applies, with probability p, one operation of TABLE, all
    equally likely. The magnitude is the same for all images, so that lookup tables and position maps are made
    only once, unless they depend on an image's levels.

    Args:
        num_layers: operations per image; the published recipes use 2.
        magnitude: strength of all operations, 16 for CIFAR-10 and 17 for ImageNet.
        translate, cutout: pixels at m = 1; None: an eighth of the image's side (CIFAR). ImageNet: 100, 40.
        fill: the level of empty pixels.
        static: pass every image through every kind of operation; operations that it did not draw leave it
            unchanged. Shapes are static and no branch depends on data, for XLA and compiled graphs, and
            nothing waits for a CUDA device. Otherwise each operation is computed only for the images that
            drew it, which is several times faster on a CPU. Both forms give the same pixels.
        compile: a function such as ``torch.compile`` that compiles the static form of a layer; or None.
    """

    def __init__(
        self,
        num_layers,
        magnitude,
        *,
        translate=None,
        cutout=None,
        fill=GREY,
        static=False,
        compile=None,
    ):
        self.num_layers = num_layers
        self.magnitude = magnitude
        self.translate = translate
        self.cutout = cutout
        self.fill = fill
        self._layer = self._every_operation if static else self._drawn_operations
        if static and compile:
            self._layer = compile(self._layer)
        self._cache = {}

    def __call__(self, images, generator=None):
        """(N, 3, H, W) uint8 → (N, 3, H, W) uint8; the input is not changed."""
        n, _, height, width = images.shape
        return self.apply(images, self.draw(n, height, width, generator, images.device))

    def draw(self, n, height, width, generator=None, device="cpu"):
        """The random choices for n images of this size: Draws on the device."""
        p = 0.2 + 0.6 * _drawn(torch.rand, (n,), generator, device)
        chance, kind, sign, row, column = _drawn(torch.rand, (5, self.num_layers, n), generator, device)
        # a float32 below 1 times the size may round up to the size
        operation = (kind * len(TABLE)).long().clamp(max=len(TABLE) - 1)
        operation = torch.where(chance < p, operation, UNCHANGED)
        row = (row * height).long().clamp(max=height - 1)
        column = (column * width).long().clamp(max=width - 1)
        return Draws(operation, sign < 0.5, torch.stack((row, column), dim=2))

    def apply(self, images, draws):
        """The drawn operations, layer by layer: (N, 3, H, W) uint8 → the same."""
        constants = self.constants(images.device, *images.shape[2:])
        for operation, negative, centre in zip(*draws, strict=True):
            images = self._layer(images, operation, negative, centre, constants)
        return images

    def arguments(self, height, width):
        """The argument of each operation at this image size, without a sign: {name: number or None}."""
        eighth = min(height, width) / 8
        translate = eighth if self.translate is None else self.translate
        cutout = eighth if self.cutout is None else self.cutout
        sizes = (self.magnitude / 10, translate, cutout)
        return {row.name: row.argument and row.argument(*sizes) for row in TABLE}

    def constants(self, device, height, width):
        """The tensors that are the same for all draws, made once per device and image size."""
        key = (str(device), height, width)
        if key not in self._cache:
            self._cache[key] = self._make_constants(device, height, width)
        return self._cache[key]

    def _make_constants(self, device, height, width):
        """Table, factor, source map and half-width for each row of TABLE and for UNCHANGED. A row differs
        from "no change" only in the tensor of its own kind."""
        arguments = self.arguments(height, width)
        levels = torch.arange(256)
        tables = levels.to(torch.uint8).repeat(len(TABLE) + 1, 1)
        factor = torch.ones(len(TABLE) + 1)
        source = torch.arange(height * width).repeat(len(TABLE) + 1, 2, 1)  # for either sign of the argument
        half = torch.zeros(len(TABLE) + 1, dtype=torch.long)
        for number, row in enumerate(TABLE):
            argument = arguments[row.name]
            if row.kind == FIXED:
                tables[number] = row.function(levels, argument)
            elif row.kind in (BLEND, GREY_BLEND):
                factor[number] = argument
            elif row.kind == WARP:
                for negative, signed in enumerate((argument, -argument)):
                    matrix = row.function(signed, height, width)
                    source[number, negative] = affine_source(matrix, height, width)
            elif row.kind == MASK:
                half[number] = argument
        tensors = {"tables": tables, "factor": factor, "source": source, "half": half}
        tensors["stretch"] = stretch_tables()
        return {"arguments": arguments, **{name: tensor.to(device) for name, tensor in tensors.items()}}

    def _drawn_operations(self, images, operation, negative, centre, constants):
        """One layer: each operation is computed for the images that drew it."""

        def operate(number, images, negative, centre):
            if number == UNCHANGED:
                return images
            row = TABLE[number]
            if row.kind == FIXED:
                return lookup(images, constants["tables"][number])
            if row.kind == LOOKUP:
                argument = constants["arguments"][row.name]
                return lookup(images, row.function(images, argument, constants["stretch"]))
            if row.kind == WARP:
                return warp(images, constants["source"][number, negative.long()], self.fill)
            if row.kind == MASK:
                return erase(images, centre, constants["half"][number], self.fill)
            levels = images.float()
            degenerate = row.function(luma(levels) if row.kind == GREY_BLEND else levels)
            return blend(degenerate, levels, constants["factor"][number])

        return by_kind(operation, len(TABLE) + 1, operate, images, negative, centre)

    def _every_operation(self, images, operation, negative, centre, constants):
        """One layer without branches: every image passes through lookup, blend, warp and mask; the kinds that
        it did not draw leave it unchanged."""

        def chosen(new, number, old):
            """The new row if an image drew the operation, else the old row."""
            return torch.where((operation == number).view(-1, *[1] * (new.dim() - 1)), new, old)

        # lookup: a table for each image and channel
        tables = constants["tables"][operation][:, None].expand(-1, 3, -1)
        for number, row in enumerate(TABLE):
            if row.kind == LOOKUP:
                made = row.function(images, constants["arguments"][row.name], constants["stretch"])
                tables = chosen(made, number, tables)
        images = lookup(images, tables)

        # blend: with factor 1, the degenerate image does not matter
        levels = images.float()
        grey = luma(levels)
        degenerate = None
        for number, row in enumerate(TABLE):
            if row.kind in (BLEND, GREY_BLEND):
                made = row.function(grey if row.kind == GREY_BLEND else levels)
                degenerate = made if degenerate is None else chosen(made, number, degenerate)
        images = blend(degenerate, levels, constants["factor"][operation].view(-1, 1, 1, 1))

        images = warp(images, constants["source"][operation, negative.long()], self.fill)
        return erase(images, centre, constants["half"][operation], self.fill)


# ------------------------------------------------------------------------------------------------- weak views


def random_flip(images, generator=None, static=False):
    """Mirror a random half of the images left to right. (N, C, H, W) uint8 → the same."""
    mirrored = _coins(images, generator)
    if static:
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    return by_kind(mirrored.long(), 2, lambda turn, chosen: chosen.flip(-1) if turn else chosen, images)


def random_crop(images, padding, generator=None, flip=False, static=False, fill=GREY):
    """Pad with ``fill`` on every side and crop the old size at random. (N, C, H, W) uint8 → the same.

    With ``flip``, half of the images are mirrored first, in the same pass.
    """
    n, channels, height, width = images.shape
    device = images.device
    mirrored = _coins(images, generator) if flip else torch.zeros(n, dtype=torch.bool, device=device)
    top, left = _drawn(torch.randint, (2 * padding + 1, (2, n, 1, 1)), generator, device)
    rows = top + torch.arange(height, device=device)[:, None]  # (N, H, 1), of the padded image

    if static:  # one map of source positions
        row = rows - padding
        column = left - padding + torch.arange(width, device=device)
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        column = torch.where(mirrored[:, None, None], width - 1 - column, column)
        return warp(images, torch.where(inside, row * width + column, height * width).flatten(1), fill)

    # padded copies of the images, mirrored images last
    order = mirrored.long().argsort()
    upright = n - int(mirrored.sum())
    tall, wide = height + 2 * padding, width + 2 * padding
    padded = images.new_full((n, channels, tall, wide), fill)
    middle = padded[:, :, padding : padding + height, padding : padding + width]
    middle[:upright] = images.index_select(0, order[:upright])
    middle[upright:] = images.index_select(0, order[upright:]).flip(-1)

    # a crop copies N · C · H runs of `width` bytes, which a CPU does at memory speed
    plane = order.argsort()[:, None] * channels + torch.arange(channels, device=device)
    start = (plane[:, :, None] * tall + rows.view(n, 1, height)) * wide + left
    return padded.flatten().unfold(0, width, 1).index_select(0, start.flatten()).view_as(images)


def _coins(images, generator):
    """A random bool for each image: (N,)."""
    return _drawn(torch.rand, (len(images),), generator, images.device) < 0.5


def cutout(images, half, generator=None, fill=GREY):
    """Fill a square of half-width ``half`` at a random place of each image. (N, C, H, W) uint8 → the same."""
    n, _, height, width = images.shape
    row = _drawn(torch.randint, (height, (n,)), generator, images.device)
    column = _drawn(torch.randint, (width, (n,)), generator, images.device)
    return erase(images, torch.stack((row, column), dim=1), half, fill)


# ---------------------------------------------------------------------------------------- what the step reads


def normalization(mean, std):
    """Two (1, 3, 1, 1) float32, scale and shift: level · scale + shift = (level / 255 − mean) / std."""
    scale = torch.tensor([1 / (255 * s) for s in std])
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
    return scale.view(1, 3, 1, 1), shift.view(1, 3, 1, 1)


class ImageViews:
    """The weak and strong views of image batches, normalised.

    Args:
        size: side of the square images in pixels.
        mean, std: three floats each, of grey levels scaled to [0, 1]; they also determine ``fill_level``.
        flip: whether images may be mirrored; False for digits and house numbers.
        crop: "pad" for small images (CIFAR). Weak: flip and a random crop after padding size/8 with ``fill``.
            Strong: weak, the RandAugment layers, a cutout of half-width size/4, flip and crop again.
            "none" for images that already are random resized crops (ImageNet). Weak: flip. Strong: flip and
            the RandAugment layers, with translate 100 and cutout 40 pixels at the published size of 224; at
            other sizes in proportion, since 100 pixels would push a small image out of sight.
        randaug: (layers, magnitude), or None for strong views without these layers.
        labeled_view: "weak" or "strong", the view of labelled images.
        strong_view: whether unlabelled images get a strong view; False: ``Views.strong`` is None.
        static, compile: see RandAugment.
    """

    def __init__(
        self,
        size,
        mean,
        std,
        *,
        flip=True,
        crop="pad",
        randaug=(2, 16),
        labeled_view="weak",
        strong_view=True,
        static=False,
        compile=None,
    ):
        self.size = size
        self.flip = flip
        self.crop = crop
        self.labeled_view = labeled_view
        self.strong_view = strong_view
        self.static = static
        self.fill = fill_level(mean, std)
        self.randaug = None
        if randaug is not None:
            translate, half = (None, None) if crop == "pad" else (100 * size / 224, 40 * size / 224)
            self.randaug = RandAugment(
                *randaug, translate=translate, cutout=half, fill=self.fill, static=static, compile=compile
            )
        self._scale, self._shift = normalization(mean, std)
        self._cache = {}

    def __call__(self, images_l, targets, images_u, generator=None):
        """images_l: (B, 3, H, W) uint8. targets: (B,) int64. images_u: (N, 3, H, W) uint8 or None. → Views"""
        labeled = self.strong if self.labeled_view == "strong" else self.weak
        with contextlib.nullcontext() if self.static else one_thread(images_l):
            labeled = self.evaluation(labeled(images_l, generator))
            weak = strong = None
            if images_u is not None and self.strong_view:
                weak, strong = self.pair(images_u, generator)
            elif images_u is not None:
                weak = self.evaluation(self.weak(images_u, generator))
        return Views(labeled, targets, weak, strong)

    def pair(self, images, generator=None):
        """Weak and strong view of the same images, normalised.

        The strong view starts from the weak view; with crop "none" each view has its own flip.
        """
        weak = self.weak(images, generator)
        strong = self._strengthen(weak if self.crop == "pad" else self.weak(images, generator), generator)
        return self._normalize(weak, strong)

    def weak(self, images, generator=None):
        """(N, 3, H, W) uint8 → uint8"""
        images = self._check(images)
        if self.crop == "pad":
            return random_crop(images, self.size // 8, generator, self.flip, self.static, self.fill)
        return random_flip(images, generator, self.static) if self.flip else images

    def strong(self, images, generator=None):
        """(N, 3, H, W) uint8 → uint8"""
        return self._strengthen(self.weak(images, generator), generator)

    def _strengthen(self, images, generator):
        if self.randaug is not None:
            images = self.randaug(images, generator)
        if self.crop == "pad":
            images = cutout(images, self.size // 4, generator, self.fill)
            images = self.weak(images, generator)
        return images

    def evaluation(self, images):
        """Normalise without augmentation: (N, 3, H, W) uint8 → float32, (level / 255 − mean) / std."""
        return self._normalize(self._check(images))[0]

    def _normalize(self, *views):
        """Normalise views into one block of float32 memory: a CPU's allocator is more likely to have one
        block than several. On a CPU it works in pieces that fit into the cache, on other devices at once."""
        n, device = len(views[0]), views[0].device
        scale, shift = self._constants(device)
        normalized = torch.empty((len(views), *views[0].shape), device=device)
        block = 2**18 // (3 * self.size**2) if device.type == "cpu" else n
        for view, target in zip(views, normalized, strict=True):
            for levels, part in zip(view.split(max(1, block)), target.split(max(1, block)), strict=True):
                part.copy_(levels).mul_(scale).add_(shift)
        return normalized.unbind()

    def _constants(self, device):
        if str(device) not in self._cache:
            self._cache[str(device)] = self._scale.to(device), self._shift.to(device)
        return self._cache[str(device)]

    def _check(self, images):
        """The images; ValueError unless they are (N, 3, size, size) uint8."""
        if images.dtype != torch.uint8 or images.shape[1:] != (3, self.size, self.size):
            wanted = f"uint8 of shape (N, 3, {self.size}, {self.size})"
            raise ValueError(f"images must be {wanted}, not {images.dtype} of {tuple(images.shape)}")
        return images


class PointViews:
    """The views of points in the plane (two moons): Gaussian noise with a standard deviation for each
    view."""

    def __init__(self, weak_std, strong_std, labeled_std=0.0):
        self.weak_std = weak_std
        self.strong_std = strong_std
        self.labeled_std = labeled_std

    def __call__(self, points_l, targets, points_u, generator=None):
        """points_l: (B, 2) float32. targets: (B,) int64. points_u: (N, 2) float32 or None. → Views"""
        labeled = jitter(points_l, self.labeled_std, generator)
        weak, strong = (None, None) if points_u is None else self.pair(points_u, generator)
        return Views(labeled, targets, weak, strong)

    def pair(self, points, generator=None):
        """Weak and strong view of the same points, (N, 2) float32 each."""
        return self.weak(points, generator), self.strong(points, generator)

    def weak(self, points, generator=None):
        return jitter(points, self.weak_std, generator)

    def strong(self, points, generator=None):
        return jitter(points, self.strong_std, generator)

    def evaluation(self, points):
        """The points as float32; they need no normalisation."""
        return points.float()


def jitter(points, std, generator=None):
    """Points plus Gaussian noise of standard deviation ``std``. (N, D) float32 → the same."""
    noise = _drawn(torch.randn, points.shape, generator, points.device)
    return points.float() + std * noise


MIXUP = 4  # first integer of mixup's random key; ``engine/loader.py`` has the keys of other random numbers


def mixup_shares(images, alpha, seed, step, rank=0, world_size=1):
    """λ ~ Beta(α, α) for each image of a batch: (N,), in the dtype and on the device of the images.

    Drawn on the host from ``seed`` and ``step`` alone, for the batches of all processes. A resumed run draws
    the same shares, and the shares do not depend on the number of processes.
    """
    generator = np.random.default_rng((MIXUP, seed, step))
    shares = generator.beta(alpha, alpha, (world_size, len(images)))[rank]
    return torch.from_numpy(shares).to(images.dtype).to(images.device, non_blocking=True)


def mixup(tensor, partners, shares):
    """λ · tensor + (1 − λ) · partners, with a λ for each image (*mixup*, Zhang et al., ICLR 2018).

    tensor, partners: (N, …) float, images or their class distributions. shares: (N,), the λ.
    """
    return torch.lerp(partners, tensor, shares.view(-1, *[1] * (tensor.ndim - 1)))


def neighbours(tensor):
    """Swap rows 2k and 2k + 1 of a batch: (N, …), N even, → the same.

    These are the partners for mixup: batches are drawn in random order, and pairs of neighbours stay together
    if a batch is split into micro-batches or over processes.
    """
    return tensor.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
