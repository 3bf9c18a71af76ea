"""Networks on a whole set of images: their predictions, their accuracy, and a file of predictions.

``predictions`` goes once over a set, each process over its part. Training, finetuning and ``--evaluate`` call
``measure_accuracy`` or ``measure_splits``; ``stored_predictions`` is for teachers that do not learn.
"""

import hashlib
import os

import torch
import torch.nn.functional as F

from engine.files import read_content, write_atomically
from engine.loader import batches, share_of
from models import mean_prediction
from utils import UserError, tell

EVALUATION_BATCH = 256  # fixed, so that an accuracy does not depend on the command


def predictions(network, image_set, views, runtime, batch_size=EVALUATION_BATCH):
    """The logits of a network for each image of a set. Each image is seen by one process. Leaves the network
    in evaluation mode.

    Args:
        views: ``ImageViews`` or ``PointViews``; its ``evaluation`` turns a batch into network inputs.
        batch_size: largest number B of images in a batch.

    Yields:
        logits (B, K) float32, without gradients; targets (B,) int64; mask (B,) float32, 1 for images of the
        set, 0 for padding and for skipped files. B is the same in all batches, for XLA.
    """
    network.eval()
    size = min(batch_size, len(image_set))
    for images, targets, mask in batches(image_set, size, runtime.device, runtime.rank, runtime.world_size):
        with torch.no_grad(), runtime.autocast():
            logits = network(*runtime.shard((views.evaluation(images),))).float()
        yield logits, targets, mask
        runtime.finish_step()


def ranked(logits, count):
    """The ``count`` most probable classes, (B, K) → (B, count) int64; ties in the order of classes."""
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :count]


def gathered(parts, image_set, runtime):
    """Collect results for the N images of a set from all processes: (N, C) on the CPU, in the order of the
    set, the same in all processes.

    Args:
        parts: iterable with this process's (B, C) tensor for each batch of ``predictions``.
    """
    found = None
    for number, part in enumerate(parts):
        rows = runtime.all_gather(part).cpu()
        if found is None:
            found = rows.new_empty(len(image_set), rows.shape[1])
        for rank, each in enumerate(rows.chunk(runtime.world_size)):
            start, stop = share_of(image_set, rank, runtime.world_size)
            place = found[start + number * len(each) : stop][: len(each)]
            place.copy_(each[: len(place)])  # the last batch is padded
    return found


def measure_accuracy(runtime, members, image_set, views):
    """``score`` of the networks ``members``, {role: network}, whose probabilities are averaged, on a set."""
    walks = {role: predictions(network, image_set, views, runtime) for role, network in members.items()}
    return score(runtime, walks)


def measure_splits(runtime, members, dataset, views):
    """``measure_accuracy`` on the test images, and top-1 on the validation images (None if there are
    none)."""
    test, confusion = measure_accuracy(runtime, members, dataset.test, views)
    if dataset.val is None:
        return test, confusion, None
    return test, confusion, measure_accuracy(runtime, members, dataset.val, views)[0]["top1"]


def score(runtime, walks, seen=None):
    """Accuracy on a set of K classes, over the images of all processes.

    Args:
        walks: {name: ``predictions``} of one network, or of several networks over the same images, whose
            probabilities are averaged.
        seen: a list; for each batch of this process a (B, 3) float32 tensor is appended: the predicted class
            of each image, its probability, and the mask.

    Returns:
        {"top1", "mean_class_top1": percent, "top5": percent, with more than five classes, "test_loss": mean
        cross-entropy}, and (K, K) float64, the number of images of class i (row) predicted as class j
        (column). With several networks also "ensemble_top1", equal to "top1", and "NAME_top1" for each
        network.
    """
    total, confusion = torch.zeros(3 + len(walks), device=runtime.device), None
    for rows in zip(*walks.values(), strict=True):
        members, (targets, *_), (mask, *_) = zip(*rows, strict=True)
        logits = mean_prediction(members)
        num_classes = logits.shape[1]
        if confusion is None:
            confusion = torch.zeros(num_classes**2, device=runtime.device)
        best, *theirs = (ranked(each, 5) for each in (logits, *members))
        among = best.eq(targets[:, None]).any(dim=1).float()
        right = [each[:, 0].eq(targets).float() for each in theirs]
        losses = F.cross_entropy(logits, targets, reduction="none")
        confusion.index_add_(0, targets * num_classes + best[:, 0], mask)
        total += (torch.stack([among, losses, torch.ones_like(losses), *right]) * mask).sum(dim=1)
        if seen is not None:
            about = best[:, 0].float(), logits.softmax(dim=1).amax(dim=1), mask
            seen.append(torch.stack(about, dim=1))
    top5, loss, count, *right = runtime.all_reduce_sum(total).tolist()
    confusion = runtime.all_reduce_sum(confusion).view(num_classes, num_classes).cpu().double()
    sizes = confusion.sum(dim=1)
    recalls = (confusion.diagonal() / sizes)[sizes > 0]
    figures = {"top1": 100 * confusion.diagonal().sum().item() / count}
    figures |= {"mean_class_top1": 100 * recalls.mean().item()}
    figures |= {"top5": 100 * top5 / count} if num_classes > 5 else {}
    if len(walks) > 1:
        figures["ensemble_top1"] = figures["top1"]
        figures |= {f"{name}_top1": 100 * hits / count for name, hits in zip(walks, right, strict=True)}
    return figures | {"test_loss": loss / count}, confusion


def stored_predictions(path, network, dataset, views, runtime):
    """Class distributions that a network predicts for all N unlabelled images, kept in a file.

    They are the softmax of ``predictions`` on images without augmentation. If the file already has the
    predictions of this network on these images, it is read. Otherwise all processes compute their parts, and
    the file is written.

    Args:
        path: path of the file, in a folder that the main process can write to.
        network: a network on the device.
        dataset: the ``Dataset`` with the unlabelled images.
        views: as for ``predictions``.

    Returns:
        (N, K) float16, indexed by ``Batch.indices_u``: on the device if the images are in memory, otherwise
        mapped from the file. Rows of skipped files are meaningless.

    Raises:
        UserError: the file cannot be written, or an image cannot be decoded.
    """
    about = _fingerprint(network, dataset)
    table = _read_table(path, about)
    if runtime.all_reduce_max_int(int(table is None)):
        tell(runtime, f"the teacher labels {len(dataset.unlabeled):,} images, once, into {path}")
        walk = predictions(network, dataset.unlabeled, views, runtime)
        rows = (F.softmax(logits, dim=1).half() for logits, *_ in walk)
        computed = gathered(rows, dataset.unlabeled, runtime)
        runtime.on_main(lambda: _write_table(path, about, computed))
        with runtime.local_main_first():
            table = _read_table(path, about)
            if table is None:  # this machine does not see the main process's files
                _write_table(path, about, computed)
                table = _read_table(path, about)
    return table.to(runtime.device) if dataset.unlabeled.in_memory else table


def _read_table(path, about):
    """The predictions in a file, mapped into memory; None unless it is whole and has the fingerprint
    ``about``."""
    try:
        content = read_content(path, mmap=True)
    except UserError:
        return None
    same = isinstance(content, dict) and content.get("about") == about
    return content["predictions"] if same else None


def _write_table(path, about, table):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_atomically(path, lambda file: torch.save({"about": about, "predictions": table}, file))


def _fingerprint(network, dataset):
    """Digest of a network's weights, of the unlabelled images in their order, and of their preprocessing."""
    image_set, digest = dataset.unlabeled, hashlib.blake2b(digest_size=16)
    tensors = [*network.state_dict().values()]
    tensors += [image_set.images] if image_set.in_memory else []
    if image_set.names is not None and image_set.fingerprints is not None:
        tensors.append(image_set.fingerprints)
    for tensor in tensors:
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    shown = [list(dataset.mean), list(dataset.std), dataset.size, dataset.crop, image_set.files]
    shown += dataset.reading.value_range or []
    digest.update(repr(shown).encode())
    return digest.hexdigest()


def check_same_test(one, other, path, other_path):
    """UserError unless two checkpoints, evaluated as an ensemble, have the same classes and test images.

    Args:
        one, other: the ``Dataset`` of each.
        path, other_path: of the checkpoints.
    """
    if one.classes != other.classes:
        raise UserError(f"{path} and {other_path} have different classes: evaluate them separately")
    tests, prints = (one.test.targets, other.test.targets), (one.test.fingerprints, other.test.fingerprints)
    if (
        one.name != other.name
        or not torch.equal(*tests)
        or (prints[0] is not None and not torch.equal(*prints))
    ):
        raise UserError(
            f"{path} and {other_path} have different test images: give --data-path, or evaluate them "
            "separately"
        )
