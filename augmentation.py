"""Weak and strong views of a whole batch, where the batch lives: flip, crop, RandAugment, cutout, mixup.

uint8 images go in, normalised float32 views come out:

    views = ImageViews(32, mean, std)            # CIFAR; ImageNet: ImageViews(224, mean, std, crop="none")
    labeled, targets, weak, strong = views(images_l, targets, images_u, generator)

Each image draws its own operations, but no operation is evaluated image by image. A grey level that depends
on the old level alone is one lookup table per image and channel; colour, contrast and sharpness are one blend
with a degenerate image; everything that moves pixels is one map of source positions; a cutout is one mask.

Every pixel is the one that Pillow computes (rounding included), with the arguments of the code published
with *Meta Pseudo Labels* (Pham et al., CVPR 2021), which follows *RandAugment* (Cubuk et al., 2020).

All randomness comes from the ``torch.Generator`` that is handed in, of the device or the host (None: torch's
default one), so that a seed fixes the views and restoring its state continues them.
"""

import contextlib
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

GREY = 128  # the level of pixels that come from outside the image, and of cutouts

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Cutout",
)
FIXED_TABLES = ("Invert", "Posterize", "Solarize", "Brightness")
BLENDS = ("Color", "Contrast", "Sharpness")
WARPS = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
UNCHANGED = len(OPERATIONS)  # the drawn "operation" of an image that a layer leaves as it is
NUMBER = {name: index for index, name in enumerate(OPERATIONS)}


class Views(NamedTuple):
    """What a training step reads: the same tensors for images and for points.

    labeled: (B, C, H, W) float32, normalised. targets: (B,) int64, classes. weak, strong: (N, C, H, W)
    float32, two views of the same N unlabelled images, or None without unlabelled images. Points have the
    shape (B, 2) and (N, 2) instead.
    """

    labeled: torch.Tensor
    targets: torch.Tensor
    weak: torch.Tensor | None
    strong: torch.Tensor | None


class Draws(NamedTuple):
    """The random choices of L RandAugment layers for N images.

    operation: (L, N) int64, index into OPERATIONS, or UNCHANGED. negative: (L, N) bool, the sign of a
    rotation, shear or translation. centre: (L, N, 2) int64, row and column of the middle of a cutout, in
    pixels.
    """

    operation: torch.Tensor
    negative: torch.Tensor
    centre: torch.Tensor


@contextlib.contextmanager
def one_thread(images):
    """Context in which a CPU computes with one thread: the operations on a batch of ``images`` are too small
    to be shared out (two threads took 1.2 to 1.8 times as long as one)."""
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
    """Random numbers on the device, drawn where the generator lives: on the host for XLA, which has none."""
    home = device if generator is None else generator.device
    return function(*arguments, generator=generator, device=home).to(device, non_blocking=True)


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

    int(v · scale + offset) in float64, as Pillow computes it. Where that is a whole number, the rounding of
    the factors decides between two levels, so the table is made once here, on the CPU, and no device has to
    repeat that arithmetic (some have no float64, some fuse the multiplication with the addition). By NumPy,
    a tenth of a second: PyTorch's threads would wait for each other a thousand times where another program
    has one of the cores, which took up to 15 seconds.
    """
    level = np.arange(256.0)
    tables = np.empty((256, 256, 256), np.uint8)
    tables[:] = np.arange(256)  # where one level is all that there is
    for low in range(255):
        scale = 255.0 / (level[low + 1 :, None] - low)
        stretched = level * scale
        stretched += -low * scale
        tables[low, low + 1 :] = stretched.clip(0, 255)
    return torch.from_numpy(tables).flatten(0, 1)


def autocontrast_tables(images, stretch):
    """(N, C, 256) uint8: the darkest level of each channel becomes 0 and the brightest 255."""
    channels = images.flatten(2)
    row = channels.amin(2).long() * 256 + channels.amax(2)
    return stretch.index_select(0, row.flatten()).view(*row.shape, 256)


def equalize_tables(images):
    """(N, C, 256) uint8: levels spread so that each is used about equally often (Pillow's integer rule)."""
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


def fixed_tables(magnitude):
    """The operations that map each level to the same level in every image: {name: (256,) uint8}.

    Posterize keeps int(4 · m) bits: none makes the image black, and 8 or more leave it as it is. The
    threshold of Solarize is int(256 · m) modulo 256, as the published cast to uint8 makes it.
    """
    m = magnitude / 10
    level = torch.arange(256)
    keep = 255 & ~(255 >> min(int(4 * m), 8))
    inverted = 255 - level
    tables = {
        "Invert": inverted,
        "Posterize": level & keep,
        "Solarize": torch.where(level < int(256 * m) % 256, level, inverted),
        "Brightness": blend(torch.zeros(256), level.float(), blend_factor(magnitude)),
    }
    return {name: table.to(torch.uint8) for name, table in tables.items()}


# ---------------------------------------------------------- colour, contrast, sharpness: blends of two images


def blend_factor(magnitude):
    """1 is the image itself, 0 the degenerate image, above 1 leads away from it."""
    return 1.8 * magnitude / 10 + 0.1


def blend(degenerate, levels, factor):
    """Pillow's blend: degenerate + factor · (image − degenerate), cut to 0…255 and rounded down.

    degenerate, levels: float32 grey levels that broadcast to (N, C, H, W). Returns uint8.
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


def warp(images, source):
    """Each pixel from another position of its image.

    images: (N, C, H, W) uint8. source: (N, H · W) int64, row · W + column of the pixel to take, or H · W for
    grey.
    """
    pixels = F.pad(images.flatten(2), (0, 1), value=GREY)
    index = source[:, None].expand(-1, images.shape[1], -1)
    return torch.gather(pixels, 2, index).view_as(images)


def affine_source(matrix, height, width):
    """Nearest-neighbour map of an affine transform: (H · W,) int64, H · W where the source is outside.

    matrix: (a, b, c, d, e, f); the output pixel with middle (x, y) = (column + ½, row + ½) comes from
    (a·x + b·y + c, d·x + e·y + f). This is Pillow's fixed-point arithmetic with 16 bits after the point; a
    pure shift is done in floating point there.
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


def warp_matrix(name, argument, height, width):
    """The affine matrix of a geometric operation, in pixels from the top-left corner.

    argument: degrees for Rotate (counter-clockwise, about the middle of the image), pixels of shift per row
    or column for ShearX and ShearY (about the top-left corner, as published), pixels for TranslateX and
    TranslateY.
    """
    if name == "Rotate":
        angle = -math.radians(argument)
        cos, sin = math.cos(angle), math.sin(angle)
        x, y = width / 2, height / 2
        return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y
    return {
        "ShearX": (1, argument, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, argument, 1, 0),
        "TranslateX": (1, 0, argument, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, argument),
    }[name]


# --------------------------------------------------------------------------------------------- cutout: a mask


def erase(images, centre, half):
    """Grey squares: rows and columns from centre − half up to, not including, centre + half.

    images: (N, C, H, W) uint8. centre: (N, 2) int64, row and column. half: int, or (N,) int64.
    """
    height, width = images.shape[2:]
    row, column = centre.unbind(1)
    inside = _near(row, half, height)[:, None, :, None] * _near(column, half, width)[:, None, None, :]
    return (images - GREY).mul_(1 - inside).add_(GREY)  # modulo 256, so this loses nothing


def _near(middle, half, length):
    """(N,) positions → (N, length) uint8, 1 where middle − half ≤ position < middle + half."""
    position = torch.arange(length, device=middle.device)
    low, high = (middle - half)[:, None], (middle + half)[:, None]
    return ((position >= low) & (position < high)).to(torch.uint8)


def by_kind(kind, kinds, function, *tensors):
    """Each kind of image through its own function: the results in the order of the images.

    kind: (N,) int64, below ``kinds``. tensors: N rows each; ``function(k, *rows)`` gets the rows of kind k
    and returns one row of the result for each.
    """
    order = kind.argsort()
    sizes = kind.bincount(minlength=kinds).tolist()
    groups = zip(*(tensor.index_select(0, order).split(sizes) for tensor in tensors), strict=True)
    results = [function(k, *rows) for k, (rows, size) in enumerate(zip(groups, sizes, strict=True)) if size]
    return torch.cat(results).index_select(0, order.argsort())


# ------------------------------------------------------------------------------------------------ RandAugment


class RandAugment:
    """Layers of one random operation each, drawn for every image of a batch by itself.

    An image draws p ~ U(0.2, 0.8); each layer then applies one of the 15 OPERATIONS, all equally likely,
    with probability p. With m = magnitude / 10 their arguments are: Rotate ± 30·m degrees, Posterize int(4·m)
    bits, Solarize threshold int(256·m) modulo 256, Color, Contrast, Brightness and Sharpness factor
    1.8·m + 0.1, ShearX and ShearY ± 0.3·m, TranslateX and TranslateY ± translate·m pixels, Cutout half-width
    int(cutout·m). The magnitude is the same for all images, so that every lookup table and position map
    which does not depend on an image's levels is made once.

    Args:
        num_layers: operations per image, the published recipes use 2.
        magnitude: strength of all operations, 16 for CIFAR-10 and 17 for ImageNet.
        translate, cutout: pixels at m = 1; None is an eighth of the image's side (CIFAR). ImageNet: 100, 40.
        static: pass every image through every form of operation, those that it did not draw being the
            identity: static shapes and no branch on data, for XLA and compiled graphs, and nothing waits for
            a CUDA device. Otherwise the images that drew an operation are gathered and only they are
            computed, which is several times faster on a CPU. Both give the same pixels.
        compile: what the static form of a layer passes through, such as ``torch.compile``; None for nothing.

    Raises:
        ValueError: a negative number of layers, magnitude, translate or cutout; images that are not uint8
            of three channels.
    """

    def __init__(self, num_layers, magnitude, *, translate=None, cutout=None, static=False, compile=None):
        for name, value in (
            ("num_layers", num_layers),
            ("magnitude", magnitude),
            ("translate", translate),
            ("cutout", cutout),
        ):
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, not {value}")
        self.num_layers = num_layers
        self.magnitude = magnitude
        self.translate = translate
        self.cutout = cutout
        self._layer = self._every_operation if static else self._drawn_operations
        if static and compile:
            self._layer = compile(self._layer)
        self._cache = {}

    def __call__(self, images, generator=None):
        """(N, 3, H, W) uint8 → (N, 3, H, W) uint8; the input stays as it is."""
        n, _, height, width = check_images(images).shape
        return self.apply(images, self.draw(n, height, width, generator, images.device))

    def draw(self, n, height, width, generator=None, device="cpu"):
        """The random choices for n images of this size: Draws on the device."""
        p = 0.2 + 0.6 * _drawn(torch.rand, (n,), generator, device)
        chance, kind, sign, row, column = _drawn(torch.rand, (5, self.num_layers, n), generator, device)
        operation = (kind * len(OPERATIONS)).long().clamp(max=len(OPERATIONS) - 1)
        operation = torch.where(chance < p, operation, UNCHANGED)
        # a float32 below 1 times the size may round up to the size
        row = (row * height).long().clamp(max=height - 1)
        column = (column * width).long().clamp(max=width - 1)
        return Draws(operation, sign < 0.5, torch.stack((row, column), dim=2))

    def apply(self, images, draws):
        """The drawn operations, layer by layer: (N, 3, H, W) uint8 → the same."""
        check_images(images)
        constants = self.constants(images.device, *images.shape[2:])
        for operation, negative, centre in zip(*draws, strict=True):
            images = self._layer(images, operation, negative, centre, constants)
        return images

    def arguments(self, height, width):
        """What each operation is called with at this image size, unsigned: {name: number or None}."""
        m = self.magnitude / 10
        eighth = min(height, width) / 8
        factor = blend_factor(self.magnitude)
        return {
            "AutoContrast": None,
            "Equalize": None,
            "Invert": None,
            "Rotate": 30 * m,
            "Posterize": int(4 * m),
            "Solarize": int(256 * m) % 256,
            "Color": factor,
            "Contrast": factor,
            "Brightness": factor,
            "Sharpness": factor,
            "ShearX": 0.3 * m,
            "ShearY": 0.3 * m,
            "TranslateX": (eighth if self.translate is None else self.translate) * m,
            "TranslateY": (eighth if self.translate is None else self.translate) * m,
            "Cutout": int((eighth if self.cutout is None else self.cutout) * m),
        }

    def constants(self, device, height, width):
        """The tensors that do not depend on the draws, made once per device and image size."""
        key = (str(device), height, width)
        if key not in self._cache:
            self._cache[key] = self._make_constants(device, height, width)
        return self._cache[key]

    def _make_constants(self, device, height, width):
        arguments = self.arguments(height, width)
        tables = torch.arange(256, dtype=torch.uint8).repeat(UNCHANGED + 1, 1)
        for name, table in fixed_tables(self.magnitude).items():
            tables[NUMBER[name]] = table
        source = torch.arange(height * width).repeat(UNCHANGED + 1, 2, 1)
        for name in WARPS:
            for negative, sign in enumerate((1, -1)):
                matrix = warp_matrix(name, sign * arguments[name], height, width)
                source[NUMBER[name], negative] = affine_source(matrix, height, width)
        half = torch.zeros(UNCHANGED + 1, dtype=torch.long)
        half[NUMBER["Cutout"]] = arguments["Cutout"]
        factor = torch.ones(UNCHANGED + 1)
        for name in BLENDS:
            factor[NUMBER[name]] = arguments[name]
        return {
            "stretch": stretch_tables().to(device),
            "tables": tables.to(device),
            "source": source.to(device),
            "half": half.to(device),
            "factor": factor.to(device),
        }

    def _drawn_operations(self, images, operation, negative, centre, constants):
        """One layer, each operation on the images that drew it."""

        def operate(number, images, negative, centre):
            if number == UNCHANGED:
                return images
            return self._operate(OPERATIONS[number], images, negative, centre, constants)

        return by_kind(operation, UNCHANGED + 1, operate, images, negative, centre)

    def _operate(self, name, images, negative, centre, constants):
        """One operation on a group of images."""
        number = NUMBER[name]
        if name == "AutoContrast":
            return lookup(images, autocontrast_tables(images, constants["stretch"]))
        if name == "Equalize":
            return lookup(images, equalize_tables(images))
        if name in FIXED_TABLES:
            return lookup(images, constants["tables"][number])
        if name in WARPS:
            return warp(images, constants["source"][number, negative.long()])
        if name == "Cutout":
            return erase(images, centre, constants["half"][number])
        levels = images.float()
        degenerate = smooth(levels) if name == "Sharpness" else luma(levels)
        if name == "Contrast":
            degenerate = mean_level(degenerate)
        return blend(degenerate, levels, constants["factor"][number])

    def _every_operation(self, images, operation, negative, centre, constants):
        """One layer without branches: every image goes through lookup, blend, warp and mask; those that it
        did not draw are the identity."""

        def drew(name):
            return (operation == NUMBER[name]).view(-1, 1, 1)

        tables = constants["tables"][operation][:, None].expand(-1, 3, -1)
        tables = torch.where(drew("AutoContrast"), autocontrast_tables(images, constants["stretch"]), tables)
        tables = torch.where(drew("Equalize"), equalize_tables(images), tables)
        images = lookup(images, tables)

        levels = images.float()
        grey = luma(levels)
        degenerate = torch.where(drew("Contrast")[..., None], mean_level(grey), grey)
        degenerate = torch.where(drew("Sharpness")[..., None], smooth(levels), degenerate)
        images = blend(degenerate, levels, constants["factor"][operation].view(-1, 1, 1, 1))

        images = warp(images, constants["source"][operation, negative.long()])
        return erase(images, centre, constants["half"][operation])


# ------------------------------------------------------------------------------------------------- weak views


def random_flip(images, generator=None, static=False):
    """Half of the images, mirrored left to right. (N, C, H, W) uint8 → the same."""
    mirrored = _coins(images, generator)
    if static:
        return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    return by_kind(mirrored.long(), 2, lambda turn, chosen: chosen.flip(-1) if turn else chosen, images)


def random_crop(images, padding, generator=None, flip=False, static=False):
    """Each image shifted by up to ``padding`` pixels, with GREY from outside. (N, C, H, W) uint8 → the same.

    This is padding on every side and a random crop of the old size. With ``flip``, half of the images are
    mirrored before, in the same pass.
    """
    n, channels, height, width = images.shape
    device = images.device
    mirrored = _coins(images, generator) if flip else torch.zeros(n, dtype=torch.bool, device=device)
    top, left = _drawn(torch.randint, (2 * padding + 1, (2, n, 1, 1)), generator, device)
    rows = top + torch.arange(height, device=device)[:, None]  # (N, H, 1), of the padded image
    if static:
        row = rows - padding
        column = left - padding + torch.arange(width, device=device)
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        column = torch.where(mirrored[:, None, None], width - 1 - column, column)
        return warp(images, torch.where(inside, row * width + column, height * width).flatten(1))
    # Padded copies, the mirrored ones last. Any `width` bytes in a row are one row of an overlapping view of
    # them, so that the crop is the selection of N · C · H such rows, which a CPU does at memory speed.
    order = mirrored.long().argsort()
    upright = n - int(mirrored.sum())
    tall, wide = height + 2 * padding, width + 2 * padding
    padded = images.new_full((n, channels, tall, wide), GREY)
    middle = padded[:, :, padding : padding + height, padding : padding + width]
    middle[:upright] = images.index_select(0, order[:upright])
    middle[upright:] = images.index_select(0, order[upright:]).flip(-1)
    plane = order.argsort()[:, None] * channels + torch.arange(channels, device=device)
    start = (plane[:, :, None] * tall + rows.view(n, 1, height)) * wide + left
    return padded.flatten().unfold(0, width, 1).index_select(0, start.flatten()).view_as(images)


def _coins(images, generator):
    """One toss for each image: (N,) bool."""
    return _drawn(torch.rand, (len(images),), generator, images.device) < 0.5


def cutout(images, half, generator=None):
    """A grey square of half-width ``half`` in each image, its middle anywhere. (N, C, H, W) uint8 → same."""
    n, _, height, width = images.shape
    row = _drawn(torch.randint, (height, (n,)), generator, images.device)
    column = _drawn(torch.randint, (width, (n,)), generator, images.device)
    return erase(images, torch.stack((row, column), dim=1), half)


def check_images(images):
    """Returns the images. Raises ValueError unless they are (N, 3, H, W) uint8."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must be uint8 of shape (N, 3, H, W), not {images.dtype} of {tuple(images.shape)}"
        )
    return images


# ---------------------------------------------------------------------------------------- what the step reads


class ImageViews:
    """The weak and strong views of image batches, normalised.

    Args:
        size: side of the square images in pixels.
        mean, std: three floats each, of grey levels scaled to [0, 1].
        flip: whether images may be mirrored; False for digits and house numbers.
        crop: "pad" for small images (CIFAR), weak = flip and a random crop after padding size/8 with grey,
            strong = weak, the RandAugment layers, a cutout of half-width size/4, flip and crop again.
            "none" for images that are random resized crops already (ImageNet), weak = flip, strong = flip and
            the layers with translate 100 and cutout 40 pixels at the published size of 224, in proportion at
            others: 100 pixels would push a small image out of sight.
        randaug: (layers, magnitude), or None for strong views without these layers.
        labeled_view: "weak" or "strong", the view of labelled images.
        static, compile: static shapes and no branch on data, compiled: see RandAugment.

    Raises:
        ValueError: an unknown crop or labelled view, mean or std that are not three numbers, images of
            another size.
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
        static=False,
        compile=None,
    ):
        if crop not in ("pad", "none"):
            raise ValueError(f"crop must be 'pad' or 'none', not {crop!r}")
        if labeled_view not in ("weak", "strong"):
            raise ValueError(f"labeled_view must be 'weak' or 'strong', not {labeled_view!r}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std must be three numbers, std above 0, not {mean} and {std}")
        self.size = size
        self.flip = flip
        self.crop = crop
        self.labeled_view = labeled_view
        self.static = static
        self.randaug = None
        if randaug is not None:
            translate, half = (None, None) if crop == "pad" else (100 * size / 224, 40 * size / 224)
            self.randaug = RandAugment(
                *randaug, translate=translate, cutout=half, static=static, compile=compile
            )
        self._scale = torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1)
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(1, 3, 1, 1)
        self._cache = {}

    def __call__(self, images_l, targets, images_u, generator=None):
        """images_l: (B, 3, H, W) uint8. targets: (B,) int64. images_u: (N, 3, H, W) uint8 or None. → Views"""
        labeled = self.strong if self.labeled_view == "strong" else self.weak
        with contextlib.nullcontext() if self.static else one_thread(images_l):
            labeled = self.evaluation(labeled(images_l, generator))
            weak, strong = (None, None) if images_u is None else self.pair(images_u, generator)
        return Views(labeled, targets, weak, strong)

    def pair(self, images, generator=None):
        """Weak and strong view of the same images, normalised.

        The strong one starts from the weak one; of large images (crop "none") each has its own flip.
        """
        weak = self.weak(images, generator)
        strong = self._strengthen(weak if self.crop == "pad" else self.weak(images, generator), generator)
        return self._normalize(weak, strong)

    def weak(self, images, generator=None):
        """(N, 3, H, W) uint8 → uint8"""
        images = self._check(images)
        if self.crop == "pad":
            return random_crop(images, self.size // 8, generator, self.flip, self.static)
        return random_flip(images, generator, self.static) if self.flip else images

    def strong(self, images, generator=None):
        """(N, 3, H, W) uint8 → uint8"""
        return self._strengthen(self.weak(images, generator), generator)

    def _strengthen(self, images, generator):
        if self.randaug is not None:
            images = self.randaug(images, generator)
        if self.crop == "pad":
            images = cutout(images, self.size // 4, generator)
            images = self.weak(images, generator)
        return images

    def evaluation(self, images):
        """Normalised and nothing else: (N, 3, H, W) uint8 → float32, (level / 255 − mean) / std."""
        return self._normalize(self._check(images))[0]

    def _normalize(self, *views):
        """All views in one block of float32 memory, which a CPU's allocator is more likely to have at hand
        than several; there piece by piece, so that a piece stays in the cache, elsewhere at once."""
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
        if check_images(images).shape[2:] != (self.size, self.size):
            raise ValueError(f"images must be {self.size} × {self.size}, not {tuple(images.shape[2:])}")
        return images


class PointViews:
    """The views of points in the plane (two moons): Gaussian jitter of a given standard deviation each."""

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
        """Points need no normalisation: float32, as they are."""
        return points.float()


def jitter(points, std, generator=None):
    """Points plus Gaussian noise of standard deviation ``std``. (N, D) float32 → the same."""
    noise = _drawn(torch.randn, points.shape, generator, points.device)
    return points.float() + std * noise


def mixup(images, targets, alpha, generator=None):
    """Mix every image and its label with those of another one of the batch, λ : 1 − λ, λ ~ Beta(α, α).

    images: (N, …) float32, targets: (N, K) float32, class distributions. One λ for the batch (*mixup*, Zhang
    et al., 2018). Returns both mixed. Raises ValueError unless α is above 0.

    torch.distributions takes no generator, so λ comes from two Gamma draws: G₁ / (G₁ + G₂).
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be above 0, not {alpha}")
    home = images.device if generator is None else generator.device
    concentration = torch.full((2,), float(alpha), device=home)
    first, second = torch._standard_gamma(concentration, generator=generator)
    share = (first / (first + second)).to(images.device)
    partner = _drawn(torch.randperm, (len(images),), generator, images.device)
    return torch.lerp(images[partner], images, share), torch.lerp(targets[partner], targets, share)
