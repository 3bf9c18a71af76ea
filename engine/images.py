"""From image files to pixels: sets of images, what is read of a file, what many of them have in common.

``ImageSet`` holds images in memory or the paths of their files. ``read_image`` decodes one file as a network
sees it; ``read_images`` decodes a set of small ones into memory.
"""

import contextlib
import hashlib
import math
import os
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from utils import UserError

SMALL = 64  # pixels: a folder of images up to this size is held in memory
ORIENTATION = 0x0112  # the EXIF tag
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
DEEP_SUFFIXES = (".png", ".tif", ".tiff", ".pgm", ".pnm")  # may hold more than 8 bits a value
# What a deep image's largest value is rounded up to: 1, or the largest value of 8 to 32 bits.
BOUNDS = (1, *(2**bits - 1 for bits in (8, 10, 12, 14, 16, 24, 32)))

# Pillow's own limit warns from half of its value on, and is one for the whole process: see ``opened``.
Image.MAX_IMAGE_PIXELS = None


# ------------------------------------------------------------------------------------------- a set of images


@dataclass(frozen=True)
class Reading:
    """How the files of a run become 8-bit pixels.

    value_range: (low, high), the values of deep images (16 bits, 32 bits, floats) that become levels 0 and
    255. None, where no training image is deep and in runs of earlier versions: whole numbers are taken as 16
    bits, floats as levels. max_megapixels: larger images are not read.
    """

    value_range: tuple | None = None
    max_megapixels: float = 500


@dataclass(eq=False)
class ImageSet:
    """Images (or points) and their classes, in memory or as files on disk."""

    targets: torch.Tensor  # (N,) int64, -1 where the class is not known; given as any sequence of int
    images: torch.Tensor | None = None  # (N, 3, H, W) uint8 or (N, 2) float32; None for files
    files: list | None = None  # N paths of images that are decoded when they are needed
    size: int = 0  # pixels, height and width to which files are decoded
    crop: str = "none"  # what evaluation sees of a file: its centre, or with "pad" the whole image
    workers: int = 0  # DataLoader processes that decode files for evaluation
    skip_unreadable: bool = False  # leave out files that cannot be decoded instead of stopping
    on_unreadable: object = None  # takes the sentence about such a file instead of a UserError
    reading: Reading = Reading()  # how files become pixels
    names: list | None = None  # of a folder: N paths relative to it, with "/"
    fingerprints: torch.Tensor | None = None  # (N,) int64 digests of the files' content, or of the pixels

    def __post_init__(self):
        self.targets = torch.as_tensor(self.targets, dtype=torch.int64)

    @property
    def in_memory(self):
        return self.images is not None

    def __len__(self):
        return len(self.targets)

    def subset(self, indices):
        """The images at these positions, in this order, as a new set."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        positions = indices.tolist()
        return replace(
            self,
            targets=self.targets[indices],
            images=None if self.images is None else self.images[indices],
            files=None if self.files is None else [self.files[i] for i in positions],
            names=None if self.names is None else [self.names[i] for i in positions],
            fingerprints=None if self.fingerprints is None else self.fingerprints[indices],
        )

    def to(self, device):
        """The same set with images and targets on the device."""
        images = self.images.to(device) if self.in_memory else None
        return replace(self, targets=self.targets.to(device), images=images)

    def extended(self, other):
        """This set followed by ``other``, which holds images of the same kind."""
        named = self.names is not None and other.names is not None
        known = self.fingerprints is not None and other.fingerprints is not None
        return replace(
            self,
            targets=torch.cat([self.targets, other.targets]),
            images=torch.cat([self.images, other.images]) if self.in_memory else None,
            files=None if self.in_memory else self.files + other.files,
            names=self.names + other.names if named else None,
            fingerprints=torch.cat([self.fingerprints, other.fingerprints]) if known else None,
        )


# -------------------------------------------------------------------------------------------------- one file

# What decoders raise for damaged files of the various formats.
DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


def read_image(path, size, crop, random=None, reading=Reading()):
    """One image as a network sees it: (3, size, size) uint8, the whole image (crop "pad") or ``read_crop``.

    Args:
        size, crop: those of the ``Dataset`` that a network was trained on.
        reading: that of its image sets.

    Raises:
        DECODING_ERRORS: the file cannot be decoded.
    """
    if crop == "none":
        return read_crop(path, size, random, reading)
    return torch.from_numpy(np.array(read_whole(path, size, reading=reading))).permute(2, 0, 1)


@contextlib.contextmanager
def opened(path, reading):
    """The image of a file, opened but not yet decoded; an error if it has too many pixels."""
    # by a file of ours: of a path Pillow maps an uncompressed TIFF into memory, in the shape that it turns to
    with open(path, "rb") as file, Image.open(file) as image:
        megapixels = image.width * image.height / 1e6
        if megapixels > reading.max_megapixels:
            raise Image.DecompressionBombError(
                f"it has {megapixels:.6g} megapixels, more than --max-megapixels {reading.max_megapixels:.6g}"
            )
        yield image


def read_whole(path, size, expected=None, reading=Reading()):
    """The whole image, stretched to a square: (size, size, 3) uint8 array.

    With ``expected`` = (width, height), an image of another size raises ``_OtherSize``.
    """
    with opened(path, reading) as file:
        if expected is None:
            file.draft("RGB", (size, size))  # a JPEG is decoded at 1/2, 1/4 or 1/8 if that is large enough
        elif upright_size(file) != expected:
            raise _OtherSize
        image = upright_rgb(file, reading.value_range)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def read_crop(path, size, random=None, reading=Reading()):
    """Decode a box of an image file: (3, size, size) uint8 tensor, bicubic.

    The box is ``random_crop_box``, or ``center_crop_box`` without ``random``. A JPEG is decoded at 1/2, 1/4
    or 1/8 of its size if that leaves the box at least ``size`` pixels wide and high, and only the box is
    resized. PyTorch resizes uint8 tensors about three times as fast as Pillow, with the same filter.
    """
    with opened(path, reading) as file:
        width, height = upright_size(file)
        if random is None:
            left, top, w, h = center_crop_box(width, height)
        else:
            left, top, w, h = random_crop_box(width, height, random)
        needed = math.ceil(width * size / w), math.ceil(height * size / h)
        file.draft("RGB", needed if file.size == (width, height) else needed[::-1])
        image = upright_rgb(file, reading.value_range)
    x, y = image.width / width, image.height / height  # 1 unless the decoder has reduced the image
    left, right = round(left * x), round((left + w) * x)
    top, bottom = round(top * y), round((top + h) * y)
    box = np.array(image.crop((left, top, max(right, left + 1), max(bottom, top + 1))))
    return resized(torch.from_numpy(box).permute(2, 0, 1)[None], size)[0]


def random_crop_box(width, height, random):
    """A box of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3, the usual crop for ImageNet.

    Args:
        width, height: of the image, pixels.
        random: ``numpy.random.Generator``.

    Returns:
        (left, top, width, height) in whole pixels. If none of ten draws fits, the largest centred box whose
        aspect ratio is allowed.
    """
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(width - w + 1)), int(random.integers(height - h + 1)), w, h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    return (width - w) // 2, (height - h) // 2, w, h


def center_crop_box(width, height):
    """(left, top, width, height) of the box left by resizing the shorter side to 256 and cropping 224."""
    side = min(width, height) * 224 / 256
    return (width - side) / 2, (height - side) / 2, side, side


# how an image is turned upright, by its EXIF orientation; 1 is upright, and other values mean nothing
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def orientation(image):
    """The EXIF orientation of an opened image, 1 to 8; 1 where the metadata say nothing or are damaged."""
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # metadata are read by many rules; the pixels may be well
        return 1
    return value if isinstance(value, int) and value in TURNS else 1


def upright_size(image):
    """(width, height) of an opened image as it is seen upright."""
    swapped = orientation(image) >= 5
    if image.format == "TIFF":  # whose tag Pillow has heeded; it turns the image while decoding
        swapped = swapped and ORIENTATION not in image.tag_v2
    return image.size[::-1] if swapped else image.size


def upright_rgb(image, value_range=None):
    """Decode an opened PIL image to RGB, turned as its EXIF orientation says.

    Grey, palette and CMYK images are converted, deep ones scaled to 8 bits (``Reading``), and transparent
    pixels become white.
    """
    image.load()
    turn = TURNS.get(orientation(image))  # of a TIFF none: Pillow has turned it and dropped the orientation
    if is_deep(image) and (value_range or image.mode != "F"):
        image = Image.fromarray(levels(np.asarray(image), value_range or (0, 65535)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def is_deep(image):
    """Whether a grey PIL image holds 16 or 32 bits or floats; Pillow reads deep colour images as 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def levels(values, value_range):
    """Values of a deep image as uint8: ``value_range`` becomes 0 to 255, what lies outside is clipped."""
    low, high = value_range
    values = values.astype(np.result_type(values, np.float32))  # exact: of 32-bit integers float64
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low).clip(low, high)
    return ((values - low) * (255 / (high - low))).round().astype(np.uint8)


def resized(images, size):
    """(N, 3, H, W) uint8 images at ``size`` x ``size``, bicubic with antialiasing."""
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True)


REPAIR = "replace or remove it, or leave out such files with --skip-unreadable"


def cannot_read(path, error):
    """What is wrong with an image that cannot be decoded; where it stops a run, ``REPAIR`` follows."""
    return f"the image {path} cannot be read ({reason(error)})"


def reason(error):
    """The first line of an exception's message, without a full stop."""
    error = getattr(error, "reason", error)  # of a failed download
    text = getattr(error, "strerror", None) or str(error)
    lines = text.strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


# ------------------------------------------------------------------------------------------------ many files


class _OtherSize(Exception):
    """An image does not have the size of the first one."""


def read_images(image_set, size):
    """Read a set of files into one uint8 tensor, by a pool of threads (decoding releases Python's lock).

    Args:
        size: pixels, height and width; None takes the longer side of the first image.

    Returns:
        ImageSet in memory, or None if ``size`` is None and not all images have one size up to 64 pixels.
    """
    files, expected = image_set.files, None
    if size is None:
        expected = next(filter(None, map(dimensions, files)), None)
        if expected is None or max(expected) > SMALL:
            return None
        size = max(expected)
    images = np.zeros((len(files), size, size, 3), np.uint8)
    readable = np.ones(len(files), bool)

    def read(start):
        for i in range(start, min(start + 256, len(files))):
            try:
                images[i] = read_whole(files[i], size, expected, image_set.reading)
            except DECODING_ERRORS as error:
                if not image_set.skip_unreadable:
                    raise UserError(f"{cannot_read(files[i], error)}: {REPAIR}") from error
                readable[i] = False

    # Measured: small files spend their time in Python, so that two threads are slower than one.
    pool = ThreadPoolExecutor(1 if expected else max(1, image_set.workers))
    try:
        list(pool.map(read, range(0, len(files), 256)))
    except _OtherSize:
        return None
    finally:
        pool.shutdown(cancel_futures=True)
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    if not readable.all():
        skipped = [files[i] for i in np.flatnonzero(~readable)]
        listed = ", ".join(skipped[:10])
        print(
            f"skipped {len(skipped)} of {len(files)} images, which cannot be read: {listed}", file=sys.stderr
        )
        if not readable.any():
            raise UserError(
                f"none of the {len(files)} images can be read (the first is {files[0]}): check the files"
            )
        images, image_set = images[torch.from_numpy(readable)], image_set.subset(np.flatnonzero(readable))
    return ImageSet(
        image_set.targets, images.contiguous(), names=image_set.names, fingerprints=image_set.fingerprints
    )


def fingerprints(files, workers=1, rule="bytes"):
    """(N,) int64 digests of the files' content: equal for copies, whatever their names.

    For a file that cannot be read the digest is that of its path.

    Args:
        rule: "bytes" takes all bytes; "pieces" is the rule of earlier versions, for their records.
    """
    return _digests(_of_all_bytes if rule == "bytes" else _of_three_pieces, files, workers)


def prints_in_stages(files, workers=1):
    """(N,) int64, equal for files with the same bytes, of many files of which few are copies.

    Sizes first, then the first and last 4 KiB of files of one size, then all bytes of files that still look
    alike. The numbers compare files of this call alone.
    """
    prints = torch.zeros(len(files), dtype=torch.int64)
    alike = np.arange(len(files))
    for digest in (_of_size, _of_both_ends, _of_all_bytes):
        prints[alike] = _digests(digest, [files[i] for i in alike.tolist()], workers)
        _, which, counts = np.unique(prints.numpy(), return_inverse=True, return_counts=True)
        alike = np.flatnonzero(counts[which] > 1)
    return prints


def pixel_prints(images):
    """(N,) int64 digests of images in memory: equal for equal pixels."""

    def numbers(chunk):
        rows = chunk.contiguous().reshape(len(chunk), -1).numpy()
        return [_number(hashlib.blake2b(row, digest_size=8)) for row in rows]

    return _by_threads(numbers, images, os.cpu_count())


def _digests(digest, files, workers):
    """(N,) int64 of a function of an open file; for a file that cannot be read, of its path."""

    def number(path):
        taken = hashlib.blake2b(digest_size=8)
        try:
            with open(path, "rb", buffering=0) as file:
                digest(file, os.fstat(file.fileno()).st_size, taken)
        except OSError:
            taken.update(os.fsencode(path))
        return _number(taken)

    return _by_threads(lambda chunk: [*map(number, chunk)], files, workers)


def _by_threads(numbers, items, workers):
    """(N,) int64 from a function of a chunk of items: hashing and reading release Python's lock."""
    chunks = [items[i : i + 256] for i in range(0, len(items), 256)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return torch.tensor([each for part in pool.map(numbers, chunks) for each in part], dtype=torch.int64)


def _number(digest):
    return int.from_bytes(digest.digest(), "big", signed=True)


def _of_size(file, size, taken):
    taken.update(size.to_bytes(8, "big"))


def _of_both_ends(file, size, taken):
    _of_size(file, size, taken)
    taken.update(file.read(4096))
    file.seek(max(0, size - 4096))
    taken.update(file.read(4096))


def _of_all_bytes(file, size, taken):
    while piece := file.read(2**20):
        taken.update(piece)


def _of_three_pieces(file, size, taken):
    """The rule of earlier versions: of files above 128 KiB the size and three pieces of 32 KiB."""
    piece = 2**15
    _of_size(file, size, taken)
    for start in (0,) if size <= 4 * piece else (0, size // 2, size - piece):
        file.seek(start)
        taken.update(file.read(4 * piece if size <= 4 * piece else piece))


def dimensions(path):
    """(width, height) of an image as seen upright; None if it cannot be opened."""
    try:
        with Image.open(path) as image:
            return upright_size(image)
    except DECODING_ERRORS:
        return None


def sizes_line(image_set):
    """The line about the sizes of the images of a set of files, from up to 200 of them."""
    sizes = [dimensions(path) for path in image_set.files[:: 1 + len(image_set) // 200]]
    sizes = sorted(filter(None, sizes), key=lambda size: size[0] * size[1])
    if not sizes:
        return "no image could be opened to see its size"
    least, most = (f"{width} × {height}" for width, height in (sizes[0], sizes[-1]))
    return f"images of {least} pixels" if least == most else f"images of {least} to {most} pixels"


def channel_statistics(images):
    """Mean and standard deviation per channel of uint8 images / 255, from at most 10,000 of them.

    Args:
        images: (N, C, H, W) uint8; evenly spaced ones are taken, so that every run gets the same result.

    Returns:
        Two tuples of C floats.
    """
    images = evenly_spaced(images, 10_000)
    total, squares = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for chunk in images.split(500):
        values = chunk.double() / 255
        total += values.sum(dim=(0, 2, 3))
        squares += values.square().sum(dim=(0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)  # images of one colour
    return tuple(mean.tolist()), tuple(std.tolist())


def evenly_spaced(items, count):
    """At most ``count`` items of a sequence."""
    return items[:: max(1, math.ceil(len(items) / count))]


def sampled_statistics(image_set):
    """``channel_statistics`` of a set of files, from up to 1,000 evenly spaced ones, each made small."""
    sample = image_set.subset(evenly_spaced(range(len(image_set)), 1000))
    return channel_statistics(read_images(sample, SMALL).images)


def constant_lines(image_set, which):
    """A warning, in a list, where there is nothing to see in a set of images; of files it looks at 20."""
    images = image_set.images
    if images is None:
        images = []
        for path in evenly_spaced(image_set.files, 20):
            with contextlib.suppress(*DECODING_ERRORS):  # said where all images are read
                images.append(read_whole(path, SMALL, reading=image_set.reading))
        if not images:
            return []
        images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    _, std = channel_statistics(images)
    if max(std) >= 2 / 255:
        return []
    return [
        f"{which} are nearly constant, all pixels have about the same level: look at some of the files; for "
        "deep images (16 bits, 32 bits, floats) --value-range LOW HIGH names the values of black and white"
    ]


# ------------------------------------------------------------------------------------- values of deep images


def find_value_range(files, reading, workers):
    """The range of values of the deep images among files, and a line about it; (None, None) without any.

    The range goes from 0 to the largest value, rounded up to one of BOUNDS; where there are negative values
    it begins at minus that bound. Up to 1,000 evenly spaced deep images are read, out of up to 10,000 files.
    """

    def deep(path):
        with contextlib.suppress(*DECODING_ERRORS), opened(path, reading) as image:
            return is_deep(image)

    def extremes(path):
        values = np.zeros(1)
        with contextlib.suppress(*DECODING_ERRORS), opened(path, reading) as image:
            values = np.asarray(image)
        values = values[np.isfinite(values)]
        return float(values.min(initial=0)), float(values.max(initial=0))

    files = evenly_spaced([path for path in files if path.lower().endswith(DEEP_SUFFIXES)], 10_000)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        found = [path for path, is_one in zip(files, pool.map(deep, files), strict=True) if is_one]
        found = evenly_spaced(found, 1000)
        ends = list(pool.map(extremes, found))
    if not found:
        return None, None
    least, most = min(low for low, _ in ends), max(high for _, high in ends)
    largest = max(most, -least)
    bound = float(next((bound for bound in BOUNDS if bound >= largest), largest))
    value_range = (-bound if least < 0 else 0.0, bound)
    seen = f"{least:.10g} to {most:.10g} occur in {len(found):,} of them"
    return value_range, f"{value_range_line(value_range)} ({seen}); --value-range LOW HIGH sets another scale"


def value_range_line(value_range):
    """The line about a run's scale of deep images."""
    low, high = value_range
    return f"deep images: values {low:.10g} to {high:.10g} are scaled to 0 to 255"
