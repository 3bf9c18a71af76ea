"""Meta Pseudo Labels: train, finetune and evaluate.

    python main.py --dataset digits --num-labeled 40 --resize 16 --model wrn-10-1 --total-steps 900 …
    python main.py --resume auto --name digits                          # continue a stopped run
    python main.py --evaluate --resume checkpoint/NAME_best.pth.tar     # a checkpoint remembers its flags
    torchrun --nproc-per-node 4 main.py --dataset cifar10 …

The recipes are run_*.sh and recipes/*.sh. A run leaves checkpoint/NAME_*.pth.tar and results/NAME/. Read this
file top to bottom: flags, set-up (``main``), ``train_loop``, ``finetune``, ``evaluate``. One step of a
method is in ``methods/``, what a checkpoint remembers and what is refused in ``run/``.
"""

import sys

from run import script

if __name__ == "__main__":
    script.begin("main.py")

import argparse
import contextlib
import copy
import os

import torch
import torch.nn.functional as F

import utils
from augmentation import ImageViews, PointViews
from data import NAMES, POINTS, read_data, write_labeled
from engine.checkpoint import Checkpoint, load_state
from engine.evaluation import check_same_test, gathered, measure_accuracy, measure_splits, predictions, score
from engine.learner import Learner
from engine.loader import TrainLoader
from engine.optimizers import sgd
from engine.runtime import Runtime
from methods import METHODS
from methods.feedback import ESTIMATORS
from methods.uda import UDA_LOSSES
from models import SeveralViews, disable_dropout, head_of
from run import arguments, identity
from run.arguments import (
    between,
    count_or_fraction,
    decodes_files,
    has_exact_feedback,
    has_feedback,
    has_scalar_feedback,
    on,
    on_images,
    sharpens,
    steps_or_fraction,
    uses,
)
from run.record import (
    FRESH,
    POSITION,
    RunLog,
    describe_run,
    figures_of,
    measured,
    new_run_id,
    result_lines,
    summarize,
    summarize_together,
)

# ---------------------------------------------------------------- flags


# fmt: off
def build_parser():
    parser = arguments.Parser(
        description="Train an image classifier from a few labels and many unlabelled images, with Meta Pseudo Labels or another method. If a help text begins with methods, such as 'uda, mpl:', the flag has an effect only with them. '(CIFAR-10 recipe: 0.2)' says what this recipe gives.",
        epilog="Begin with a recipe, a complete command line to which you can add flags:\n"
        "  bash recipes/digits.sh                                    # minutes on a CPU, no download\n"
        "  bash recipes/folder.sh --data-path DIR --num-labeled all  # your own photographs\n"
        "  python main.py --name digits --resume auto                # continue a run\n"
        "  python main.py --evaluate --resume checkpoint/digits_best.pth.tar",
    )
    steps, count, small = between(int, 1), between(int, 0), between(float, 0, 0.999999)
    rate, weight, share = between(float, 0, 1e3), between(float, 0, 1e6), between(float, 0, 1)
    yes_or_no = argparse.BooleanOptionalAction

    add = parser.group("run")
    add("--name", help="name of the run and of its files (default: the name of the data set, or of its folder)", quiet=True)
    add("--save-path", default="checkpoint", help="folder of the checkpoints", path=True)
    add("--results-path", default="results", help="folder of metrics, summary and pictures", path=True)
    add("--seed", type=between(int, 0, 2**63 - 1), default=0, help="seed of all random numbers: choice of labelled images, initial weights, batches, augmentation", identity=True)
    add("--resume", action="append", metavar="CKPT", help="checkpoint to continue, finetune or evaluate; it supplies all flags that are not given. auto: the last checkpoint of this --name, if there is one", command=True, path=True)
    add("--keep", type=count, default=0, metavar="N", help="also keep the checkpoints of the last N evaluations", quiet=True)
    add("--pictures", action=yes_or_no, default=True, help="draw the run's curves and confusion matrix when it ends, which takes about a second; visualize.py draws them at any time", quiet=True)
    add("--overwrite", action="store_true", help="replace an earlier run of the same --name; it is kept aside until the new run has written its first checkpoint", command=True)
    add("--evaluate", action="store_true", help="only evaluate the checkpoint of --resume; several checkpoints (--resume A --resume B) are evaluated as an ensemble", command=True)
    add("--tta", default="none", choices=SeveralViews.CHOICES, help="also measure the mean prediction of several views of each test image: the image and its mirror image, with shift also both shifted", quiet=True, only=on_images)
    add("--finetune", action="store_true", help="only finetune the checkpoint of --resume", command=True)
    add("--device", default="auto", choices=Runtime.KINDS, help="device that computes; auto: CUDA, else another accelerator, else the CPU", quiet=True)
    add("--amp", action="store_true", help="mixed precision: networks compute in the type of --amp-dtype (recipes for images)")
    add("--amp-dtype", default="bf16", choices=("bf16", "fp16"), help="number type of --amp; fp16 needs CUDA")
    add("--channels-last", action="store_true", help="store images and filters in the memory order in which convolutions are faster (recipes for images)")
    add("--compile", action="store_true", help="torch.compile the networks and, on a GPU, the views: the first step is slow, later steps are faster; needs a C++ compiler")
    add("--cuda-graph", action=yes_or_no, default=False, help="CUDA, one process, SGD: capture a training step once and replay it; no run has used this to its end yet (docs/details.md)")
    add("--sync-bn", action="store_true", help="batch norm computes its statistics over the batches of all processes (ImageNet recipe)")

    add = parser.group("data")
    add("--dataset", default="cifar10", choices=NAMES, help="data set; twomoons and digits need no download; folder: your own images", identity=True)
    add("--svhn-extra", action="store_true", help="SVHN: the 531,131 extra images are unlabelled images, too (SVHN recipe; the paper's SVHN-1K)", identity=True, only=on("svhn"))
    add("--data-path", default="data", help="folder of the data set", path=True)
    add("--labels", metavar="FILE", help="table of the classes of your own images (CSV with a header such as image,label), instead of class folders; implies --dataset folder", path=True)
    add("--label-columns", nargs=2, metavar=("FILE", "LABEL"), help="with --labels: names of the columns of files and of labels (default: the columns with the usual names)", only=lambda args: args.labels)
    add("--num-labeled", type=count_or_fraction, default=4000, metavar="N", help="number of labelled images, drawn per class with --seed; a number below 1: a fraction of the training images; all: every labelled image", identity=True)
    add("--labeled-indices", metavar="FILE", help="instead of --num-labeled: file that lists the labelled images, such as another run's labeled_indices.txt or labeled.txt", path=True)
    add("--num-val", type=count, default=0, metavar="N", help="number of labelled images, beside those of --num-labeled, set aside to choose the best checkpoint; 0: the last one, unless the folder has val/ and test/", identity=True)
    add("--test-fraction", type=small, default=0.2, metavar="F", help="folder with neither test/ nor val/: share of each class that is set aside for testing", identity=True, only=on("folder"))
    add("--unlabeled-path", metavar="DIR", help="folder of images without classes, searched at any depth, for the unlabelled set (default: unlabeled/ of --dataset folder, if there is one)", path=True)
    add("--unlabeled-mode", default="add", choices=("add", "only"), help="add: the images of --unlabeled-path join the training images in the unlabelled set; only: they replace the training images there")
    add("--keep-test-copies", action="store_true", help="also learn from copies of test or validation images, as published results on STL-10 do: test accuracies are then too high", identity=True)
    add("--skip-unreadable", action="store_true", help="leave out images that cannot be read, and name them, instead of stopping")
    add("--value-range", type=between(float, -1e30, 1e30), nargs=2, metavar=("LOW", "HIGH"), help="images with more than 8 bits per channel: the values shown as black and as white (default: 0 and the largest value of the training images, rounded up to full bits)", identity=True, only=decodes_files)
    add("--max-megapixels", type=between(float, 0.001, 1e6), default=500.0, metavar="N", help="largest size of an image in megapixels; larger images count as unreadable", only=decodes_files)
    add("--resize", type=between(int, 1, 2**12), metavar="PIXELS", help="side of the images in pixels (default: the data set's own, digits 16, imagenet 224; a folder: its images' size up to 64, else 224)", identity=True, only=on_images)
    add("--workers", type=count, default=2, help="threads or processes that read images", quiet=True)

    add = parser.group("augmentation")
    add("--randaug", type=between(int, 0, 100), nargs=2, default=[2, 16], metavar=("LAYERS", "MAGNITUDE"), help="operations of RandAugment per image of the strong view, and their strength; 10 is the full range (CIFAR-10 recipe: 2 16)", only=lambda args: on_images(args) and (METHODS[args.method].uses_strong_view or args.labeled_view == "strong"))
    add("--labeled-view", default="weak", choices=("weak", "strong"), help="view of the labelled images; strong: with RandAugment, as in the paper's Table 10", only=on_images)
    add("--mixup-alpha", type=rate, default=0.0, metavar="F", help="mixup of labelled images, with shares from Beta(F, F), in the loss of the teacher or of the only network; 0: none (semimeta recipe: 1)", only=uses("uses_mixup"))
    add("--jitter", type=rate, nargs=2, default=[0.0, 0.3], metavar=("WEAK", "STRONG"), help="two moons: standard deviation of the noise in the weak and in the strong view (two moons recipe: 0 0.15)", only=on(*POINTS))

    add = parser.group("networks")
    add("--model", help="wrn-DEPTH-WIDTH, fastcnn-A-B-C, mlp-2-8-8-2, convlarge, efficientnet-b0 to -l2, a classifier of torchvision, or timm/NAME (default: depends on the data set)", identity=True)
    add("--student-model", metavar="MODEL", help="mpl, pseudo-label, reduced-mpl: network of the student (default: the network of --model)", identity=True, only=uses("uses_student_model"))
    add("--pretrained", action=yes_or_no, default=False, help="start from published weights, downloaded on first use: ImageNet weights of torchvision, or weights of timm (folder recipe)")
    add("--weights", metavar="FILE", help="start from the weights in this file, instead of published weights", path=True)
    add("--normalize", default="auto", choices=("auto", "imagenet", "dataset"), help="mean and std for images: imagenet, dataset, or auto: what the start weights (--pretrained, --weights) expect, else dataset")
    add("--bn-momentum", type=share, metavar="F", help="batch norm: share of the new batch in the running statistics (default: published 0.01; with --pretrained or --weights the network's own)")
    add("--bn-eps", type=between(float, 1e-12, 1), metavar="F", help="batch norm: number added to the variance (default: published 1e-3; with --pretrained or --weights the network's own)")
    add("--freeze-body", action=yes_or_no, default=False, help="train only the last layer; the other layers keep the weights of --pretrained or --weights (folder recipe)", identity=True)
    add("--body-lr-scale", type=between(float, 1e-6, 1e3), default=1.0, metavar="F", help="factor: all layers but the last learn at F times the learning rate of the last layer, also in finetuning (for transfer: 0.1 or less)", identity=True, only=lambda args: not args.freeze_body)
    add("--teacher-dropout", type=small, default=0.0, help="mpl: dropout rate before the teacher's classifier (CIFAR-10 recipe: 0.2)", only=uses("trains_teacher"))
    add("--student-dropout", type=small, default=0.0, help="dropout rate before the classifier of the student, or of the only network (CIFAR-10 recipe: 0.2)")
    add("--stochastic-depth", type=small, metavar="F", help="probability that a training step leaves out the network's last block (default: the network's own, 0.2 for EfficientNet)")
    add("--ema", type=share, default=0.995, help="decay of the moving average of the weights; 0: no average (CIFAR-10 recipe: 0.995)")

    add = parser.group("optimisation")
    add("--total-steps", type=steps, default=300_000, help="training steps; the schedule of the learning rate ends here. Other numbers of steps may be given as a fraction of it: --warmup-steps 0.1")
    add("--eval-step", type=steps_or_fraction(1), default=1000, help="steps between evaluations; each evaluation writes a checkpoint")
    add("--log-step", type=steps_or_fraction(1), default=50, help="steps between lines of metrics.jsonl (losses, learning rates, images per second); each line waits for the device", quiet=True)
    add("--start-step", type=count, default=0, help="first step; --resume sets it", command=True)
    add("--batch-size", type=between(int, 1, 2**20), default=64, help="labelled images per step and process")
    add("--mu", type=between(int, 1, 2**10), default=7, help="unlabelled images in a step for each labelled image: the unlabelled batch is --mu times --batch-size", only=uses("uses_unlabeled"))
    add("--teacher-lr", "--teacher_lr", type=rate, default=0.05, help="mpl: peak learning rate of the teacher (with --switch-every: of the network that begins as the teacher); reduced-mpl: of the perceptron", only=uses("trains_teacher", "uses_feedback"))
    add("--student-lr", "--student_lr", type=rate, default=0.05, help="peak learning rate of the student (with --switch-every: of the network that begins as the student), or of the only network")
    add("--accumulate", type=steps, default=1, metavar="N", help="pass each batch in N micro-batches, one after the other, to save memory; batch norm sees one micro-batch at a time")
    add("--optimizer", default="sgd", choices=("sgd", "adamw", "rmsprop", "muon"), help="sgd; adamw (folder recipe); muon: for filters and matrices, with SGD for the rest; rmsprop: TensorFlow's RMSProp, as EfficientNet was published (decay 0.9, epsilon 1e-3)", identity=True)
    add("--schedule", default="cosine", choices=("cosine", "linear", "one-cycle", "constant", "milestones"), help="shape of the learning rate after the warm-up; milestones: divided by 10 at each of --milestones (folder recipe: one-cycle)")
    add("--milestones", type=steps_or_fraction(0), nargs="+", default=[300_000, 350_000], metavar="STEP", help="with --schedule milestones: steps at which the learning rate is divided by 10 (semimeta recipe: 300000 350000)", only=lambda args: args.schedule == "milestones")
    add("--momentum", type=small, default=0.9, help="momentum of SGD and RMSProp", only=lambda args: args.optimizer != "adamw")
    add("--nesterov", action="store_true", help="Nesterov momentum in SGD (CIFAR-10 recipe)", only=lambda args: args.optimizer == "sgd")
    add("--weight-decay", type=rate, default=5e-4, help="weight decay, not applied to batch norm")
    add("--warmup-steps", type=steps_or_fraction(0), default=0, help="first steps, in which the learning rate rises to its peak (CIFAR-10 recipe: 5000)")
    add("--grad-clip", type=weight, default=0.0, help="largest allowed norm of the gradient; 0: no bound (ImageNet recipe: 5)")
    add("--label-smoothing", type=small, default=0.0, help="share of each label, and of each pseudo label of the student, that is spread evenly over all classes (CIFAR-10 recipe: 0.15)")

    add = parser.group("method")
    add("--method", default="mpl", choices=sorted(METHODS), help="training method; docs/methods.md describes each", identity=True)
    add("--student-wait-steps", type=steps_or_fraction(0), default=0, help="mpl: steps before the student's warm-up begins, in which only the teacher learns (CIFAR-10 recipe: 3000)", only=uses("trains_teacher"))
    add("--switch-every", type=steps_or_fraction(0), default=0, metavar="N", help="mpl: teacher and student exchange roles every N steps (role-playing); 0: never (folder recipe: 200; TransferMPL: every epoch)", identity=True, only=uses("trains_teacher"))
    add("--ensemble", action=yes_or_no, default=False, help="mpl: evaluate the mean of the student's and the teacher's probabilities, with moving averages where there are any (folder recipe)", only=uses("trains_teacher"))
    add("--teacher-warmup-steps", type=steps_or_fraction(0), default=0, metavar="N", help="mpl: first steps, in which the teacher learns from the labels alone; the student waits at least as long", only=uses("trains_teacher"))
    add("--student-labeled-weight", type=weight, default=0.0, metavar="F", help="mpl: weight of the labelled images in the student's loss, beside its pseudo labels (published: 0)", only=uses("trains_teacher"))
    add("--temperature", type=between(float, 1e-3, 1e3), default=0.7, help="uda, mpl: temperature of the prediction on the weak view; below 1, it sharpens the prediction (CIFAR-10 recipe: 0.7)", only=sharpens)
    add("--confidence", default="threshold", choices=("threshold", "relative", "soft"), help="uda, fixmatch, mpl: which unlabelled images count: those above --threshold, above a share of the labelled images' confidence, or all with weights", only=uses("uses_consistency"))
    add("--threshold", type=share, default=0.6, help="uda, fixmatch, mpl: smallest probability at which an unlabelled image counts, after --temperature (fixmatch: before it); relative: a factor, give 0.9", only=uses("uses_consistency", where=lambda args: args.confidence != "soft"))
    add("--uda-loss", default="ce", choices=(*UDA_LOSSES,), help="uda, mpl: loss between the weak and the strong prediction: cross-entropy, or negative cosine similarity (TransferMPL)", only=sharpens)
    add("--lambda-u", type=weight, default=8.0, help="uda, fixmatch, mpl: weight of the UDA loss (fixmatch, published: 1); semimeta: weight of its unlabelled loss (recipe: 1); 0: none", only=uses("uses_unlabeled_weight"))
    add("--uda-steps", type=steps_or_fraction(0), default=5000, help="uda, fixmatch, mpl, semimeta: first steps, in which the weight grows from 0 to --lambda-u (fixmatch, published: 0)", only=uses("uses_unlabeled_weight"))
    add("--align", type=share, default=0.0, metavar="RATE", help="uda, fixmatch, mpl: rate at which predictions are evened out over the classes; 0: none, as published; for few labels and large batches: 0.2", only=uses("uses_consistency"))
    add("--align-to", default="uniform", choices=("uniform", "labeled"), help="uda, fixmatch, mpl: the goal of --align: all classes equally often, or as often as among the labelled images", only=uses("uses_consistency"))
    add("--weak-pass", default="joint", choices=("joint", "apart", "ema"), help="uda, fixmatch, mpl: weak views pass in one batch with the other images (published), apart and without gradient, or through the moving average", identity=True, only=uses("uses_consistency"))
    add("--pseudo-label", default="argmax", choices=("argmax", "sample", "soft"), help="pseudo-label, mpl, reduced-mpl: the label is the most probable class, a class drawn by probability, or the whole distribution", only=uses("uses_pseudo_labels"))
    add("--pseudo-label-view", default="weak", choices=("weak", "strong"), help="pseudo-label, mpl: the view that the teacher labels", only=uses("uses_label_view"))
    add("--feedback", default="taylor", choices=("none", *ESTIMATORS), help="mpl, reduced-mpl: feedback of the student's labelled loss. taylor: its change; dot: the paper's estimate of it; exact: its gradient, for soft labels", only=uses("uses_feedback"))
    add("--feedback-weight", type=between(float, -1e6, 1e6), default=1.0, help="mpl, reduced-mpl: weight of the feedback term in the teacher's loss", only=has_feedback)
    add("--feedback-reduction", default="mean", choices=("mean", "sum"), help="mpl, reduced-mpl: mean (published) or sum (unbiased) over images of the cross-entropy that the taylor or dot feedback multiplies", only=has_scalar_feedback)
    add("--feedback-view", default="same", choices=("same", "strong"), help="mpl: view in the term of taylor and dot: the view that was labelled (same), or the strong view with new labels (MPL-pytorch)", only=lambda args: uses("uses_label_view")(args) and has_scalar_feedback(args))
    add("--feedback-momentum", type=small, default=0.0, help="mpl, reduced-mpl: decay of the moving average that is subtracted from the taylor or dot feedback; 0: none (published: 0.99)", only=has_scalar_feedback)
    add("--flip-feedback", action="store_true", help="mpl, reduced-mpl: reverse the sign of the feedback (new loss minus old loss), as the published code does", only=has_feedback)
    add("--feedback-jvp", default="auto", choices=("auto", "forward", "difference"), help="exact feedback and semimeta: how the derivative is computed; leave it at auto: forward mode, or a central difference where there is none", only=lambda args: uses("uses_derivative")(args) or has_exact_feedback(args))
    add("--teacher-checkpoint", metavar="FILE", help="pseudo-label, reduced-mpl: checkpoint of the fixed teacher", path=True, only=uses("uses_teacher_checkpoint"))

    add = parser.group("finetuning on the labelled images, after training")
    add("--finetune-epochs", type=count, default=625, help="epochs of finetuning; 0: no finetuning")
    add("--finetune-batch-size", type=between(int, 1, 2**20), default=512, help="labelled images per step and process, at most all labelled images")
    add("--finetune-lr", type=rate, default=3e-5, help="learning rate, which stays constant")
    add("--finetune-weight-decay", type=weight, default=0.0, help="weight decay, not applied to batch norm")
    add("--finetune-momentum", type=small, default=0.9, help="Nesterov momentum of SGD")

    add = parser.group("for published commands, which give these flags; no run needs them")
    add("--num-classes", type=steps, metavar="K", help="number of classes, only compared with the number in the data set")
    add("--expand-labels", action="store_true", help="ignored: labelled images are always repeated endlessly here", quiet=True)
    add("--local-rank", "--local_rank", help="ignored: the rank is read from the environment", command=True)
    return parser
# fmt: on


def parse_arguments(argv, saved=None, path=None):
    """The command line, checked; what it does not say is as in the checkpoint ``saved`` at ``path``, if any."""
    parser = build_parser()
    return arguments.resolve(parser, *parser.parse_given(argv), saved, path)


# ---------------------------------------------------------------- set-up


def main(argv):
    """From a command line to a trained, finetuned or evaluated network; UserError for invalid input."""
    parser = build_parser()
    args, given = parser.parse_given(argv)
    arguments.check_resumed(args)
    if utils.first_process() and not args.evaluate:
        identity.find_again(args)
    runs = []  # the arguments of a run and its checkpoint; several to be evaluated together
    if not args.resume:
        runs.append((arguments.resolve(parser, args, given), None))  # checked before a device is started
    runtime = Runtime(arguments.device_of(args, given))
    for resume in args.resume or ():
        starts = bool(given & {"dataset", "labels"})
        path, saved = arguments.read_checkpoint(args, resume, runtime, starts)
        runs.append((arguments.resolve(parser, args, given, saved, path), saved))
    args, saved = runs[0]
    if args.evaluate and args.amp and args.amp_dtype == "fp16" and runtime.kind != "cuda":
        utils.tell(runtime, f"fp16 needs CUDA: evaluating in float32 on {runtime.kind}")
        args.amp = False
    runtime.configure(
        args.amp, args.amp_dtype, args.channels_last, args.sync_bn, args.compile, args.cuda_graph
    )
    if args.evaluate:
        evaluate(runtime, runs)
    else:
        train(args, runtime, saved or {}, "labeled_indices" in given)
    runtime.close()


def train(args, runtime, saved, labels_given):
    """Read the data, build the networks, then train and finetune; write the summary and the pictures.

    All that can be refused is refused before anything is written. ``saved``: the checkpoint, {} without one.
    """
    # data
    runtime.on_main(lambda: identity.check_free(args, saved))
    with runtime.local_main_first():
        dataset = read_data(args, saved.get("data"), labels_given)
    expected = None if saved or not dataset.size else arguments.expected_statistics(args)
    if expected:
        dataset.mean, dataset.std = map(list, expected)
    views = build_views(args, dataset, runtime)

    # networks
    torch.manual_seed(args.seed)  # the same initial weights in every process
    method = members = None
    if args.finetune:
        members = saved_members(args, runtime, saved, dataset.num_classes, dataset.size)
    else:
        method = METHODS[args.method](args, dataset.num_classes, dataset.size, runtime, dataset.class_shares)
        if saved:
            method.load_state_dict(saved, args.resume)
        elif not args.weights:
            method.fit(dataset, views)

    # the run: its id, its record, what an earlier process has finetuned
    last_step = saved["step"] if args.finetune else args.total_steps  # before finetuning
    run_id = saved.get("run") if identity.is_own(args, saved) else runtime.on_main(new_run_id)
    finetuned = identity.finetuned_before(args, runtime, saved, run_id, last_step)
    tuned_step = last_step + finetuned.get("finetune_step", 0)
    folder = os.path.join(args.results_path, args.name)
    with contextlib.ExitStack() as stack:
        stack.enter_context(identity.claim(args, runtime, saved, run_id))
        log = RunLog(
            folder,
            args,
            run_id=run_id,
            start_step=None if args.finetune else args.start_step,
            finetune_from=tuned_step if args.finetune or finetuned else None,
            active=runtime.is_main,
        )
        stack.callback(log.close)
        if method:
            method.prepare(dataset, views, folder)

        # train, finetune, sum up
        interrupt = stack.enter_context(utils.Interrupt())
        for image_set in filter(None, (dataset.labeled, dataset.unlabeled, dataset.val, dataset.test)):
            image_set.on_unreadable = interrupt.note_fault
        runtime.on_main(lambda: write_labeled(log.folder, dataset))
        describe_run(args, runtime, dataset, method, folder, saved.get("step"))
        if method:
            state = FRESH | {key: saved[key] for key in (*FRESH, *POSITION) if saved.get(key) is not None}
            state["run"] = run_id
            train_loop(args, runtime, dataset, views, method, log, state, interrupt)
            figures = figures_of(state) | {"steps": args.total_steps}
            if method.teacher_network is not None and "teacher" not in method.members:
                teacher = {"teacher": method.teacher_network}
                test, _ = measure_accuracy(runtime, teacher, dataset.test, views)
                figures["teacher_top1"] = test["top1"]
            if args.tta != "none" and dataset.size:
                figures["tta_top1"] = measure_views(args, runtime, method.members, dataset, views)
        else:
            figures = {"steps": last_step}
            if "finetune_step" not in saved:
                test, confusion = measure_accuracy(runtime, members, dataset.test, views)
                figures |= measured(test, confusion, dataset.classes)
        earlier = log.read_summary() if args.finetune else {}
        summary = summarize(
            args, runtime, earlier | figures, len(dataset.labeled), dataset.val is not None, run_id
        )
        log.summary(summary)
        if args.finetune_epochs:
            network = selected(args, runtime, dataset, method.predictor) if method else members["student"]
            summary["finetune_top1"] = finetune(
                args, runtime, dataset, views, network, log, last_step, run_id, finetuned, interrupt
            )
            log.summary(summary)
    if runtime.is_main:
        print("\n".join(result_lines(summary)), flush=True)
        try:
            if args.pictures:
                import visualize  # here, so that training starts without what draws

                visualize.finished_run(folder, dataset)
        except Exception as error:  # a warning: the run is finished and saved
            print(f"a picture could not be drawn: {error}", file=sys.stderr)


# ---------------------------------------------------------------- training


def train_loop(args, runtime, dataset, views, method, log, state, interrupt):
    """Train from ``args.start_step`` to ``args.total_steps``; evaluate and save every ``--eval-step`` steps.

    Args:
        state: the run's state (``FRESH``), updated in place; with the ``POSITION`` of a checkpoint where a
            run is continued.
        interrupt: an entered ``Interrupt``; after a signal the loop saves and exits with 128 + its number,
            after a fault with 2.
    """
    mu = args.mu if method.uses_unlabeled else 0
    loader = TrainLoader(dataset, args.batch_size, mu, args.seed, runtime, args.workers)
    loader.load_state_dict(state.get("loader", {"position": args.start_step}))
    meters = utils.Meters(runtime, identity.checkpoint_path(args, "last"))  # the path is for its errors
    if "meters" in state:
        meters.load_state_dict(state["meters"])
    progress = utils.Progress(args.name, args.total_steps, args.start_step, runtime.is_main)
    images_per_step = args.batch_size * (1 + mu) * runtime.world_size
    throughput = utils.Throughput(state, images_per_step, args.start_step)  # adds to the state's totals
    cost = utils.Cost(state, method, runtime.world_size)
    record_of_data = dataset.record()

    def take_step(batch, step, diagnose=False):
        made = runtime.shard(views(batch.images_l, batch.targets, batch.images_u, loader.generator))
        return method.step(made._replace(indices=batch.indices_u), step, batch.targets_u, diagnose=diagnose)

    graphed_step = runtime.graph(take_step, loader.generator)  # without --cuda-graph take_step itself

    def checkpoint(taken, *kinds):
        state.update(meters=meters.state_dict(), loader=loader.state_dict())
        content = method.state_dict() | state
        content |= {"networks": method.networks(args), "predicting": list(method.members)}
        content |= {"step": taken, "args": vars(args), "data": record_of_data}
        identity.save(args, runtime, content, kinds)

    def stop(taken, status):
        """End the process after so many steps, saved if there are new ones."""
        if taken > args.start_step:
            meters.read()  # raises if a loss was not finite
            if taken > throughput.taken:  # else a line of metrics.jsonl has counted them
                throughput.count(taken)
            method.sync_statistics()
            loader.position = taken  # a batch that was drawn for the next step is drawn again
            checkpoint(taken, "last")
            progress.stopped(f"after step {taken}", identity.checkpoint_path(args, "last"))
        interrupt.end(status)

    runtime.finish_step()  # on XLA the set-up is no part of the first step
    for step in range(args.start_step, args.total_steps):
        # a batch, then its views and a step of the method
        batch = next(loader)
        if interrupt.fault and runtime.processes == 1:  # several can only stop together, after a step
            stop(step, 2)
        runtime.seed(args.seed, step)
        evaluating = (step + 1) % args.eval_step == 0 or step + 1 == args.total_steps
        scalars = take_step(batch, step, diagnose=True) if evaluating else graphed_step(batch, step)
        cost.count()
        meters.update(scalars, step)
        runtime.finish_step()

        # figures: the only places that wait for the device
        figures = None
        if evaluating or (step + 1) % args.log_step == 0:
            record = meters.read()
            meters.reset()
            record |= {"images_per_second": throughput.count(step + 1), "pflop": state["pflop"]}
            record |= {f"{role}_rate": learner.schedule(step) for role, learner in method.learners.items()}
            losses = [f"loss {value:.3f}" for name, value in record.items() if name.endswith("_loss")]
            figures = ", ".join([*losses[:1], f"{record['images_per_second']:.0f} images/s"])
            if not evaluating:
                log.record(step + 1, record)
        progress.step(figures)

        # an evaluation, a checkpoint
        if evaluating:
            record |= {name: value.item() for name, value in method.diagnostics.items()}
            method.sync_statistics()
            test, confusion, val_top1 = measure_splits(runtime, method.members, dataset, views)
            record |= test | ({} if val_top1 is None else {"val_top1": val_top1})
            best = state["best_val_top1"]
            better = val_top1 is None or best is None or val_top1 > best
            if better:
                state["best_top1"], state["best_step"] = test["top1"], step + 1
                state["best_val_top1"] = val_top1
                log.confusion(confusion, dataset.classes)
            state.update(measured(test, confusion, dataset.classes))
            state["oracle_top1"] = max(state["oracle_top1"], test["top1"])
            log.record(step + 1, record)
            kinds = ["best"] if better else []
            if args.keep:
                kinds.append(f"step{step + 1:08}")
            checkpoint(step + 1, *kinds, "last")  # a run that is killed before "last" does these steps again
            if args.keep and runtime.is_main:
                identity.drop_checkpoints(args, step + 1)
            progress.record(step + 1, record)
            throughput.restart(step + 1)

        # a signal, or an image that cannot be read
        if status := interrupt.stops(runtime, wait=evaluating):
            stop(step + 1, status)
    progress.close()


def selected(args, runtime, dataset, network):
    """The network that validation chose; without ``--num-val`` the one given, after the last step."""
    if dataset.val is None:
        return network
    network, best = copy.deepcopy(network), identity.checkpoint_path(args, "best")
    load_state(network, Checkpoint.read(best, runtime).weights(), best)
    return network


# ---------------------------------------------------------------- finetuning and evaluation


def measure_views(args, runtime, members, dataset, views):
    """The test accuracy, in percent, of networks that see each image in all views of ``--tta``."""
    members = {role: SeveralViews(network, args.tta) for role, network in members.items()}
    return measure_accuracy(runtime, members, dataset.test, views)[0]["top1"]


def finetune(args, runtime, dataset, views, network, log, steps_before, run_id, before, interrupt):
    """Train a copy of ``network`` on the labelled images alone.

    Without dropout, as in the published code. SGD at a constant rate, up to ten evaluations on the way, with
    a checkpoint each. With ``--num-val`` the one with the best validation accuracy is taken, else the last.

    Args:
        steps_before: the step of the checkpoint that is finetuned; figures are logged after it.
        run_id: the run's id.
        before: what an earlier process saved in ``NAME_finetune_last``, to continue from; {} to begin.
        interrupt: as in ``train_loop``.

    Returns:
        The top-1 accuracy, in percent, of the network that is taken.
    """
    network = copy.deepcopy(network).requires_grad_(not args.freeze_body)
    head_of(network).requires_grad_(True)
    disable_dropout(network)
    batch_size = min(args.finetune_batch_size, len(dataset.labeled))
    steps = max(1, args.finetune_epochs * len(dataset.labeled) // (batch_size * runtime.world_size))
    loader = TrainLoader(dataset, batch_size, 0, args.seed + 1, runtime, args.workers)
    rate, momentum, decay = args.finetune_lr, args.finetune_momentum, args.finetune_weight_decay
    learner = Learner(
        network,
        runtime,
        optimizer=lambda network: sgd(network, rate, momentum, True, decay, args.body_lr_scale),
        schedule=lambda step: rate,
    )
    network = learner.network
    members = {"student": network}
    meters = utils.Meters(runtime, identity.checkpoint_path(args, "finetune_last"))
    done, state = 0, {"best_val_top1": None, "finetune_top1": None}
    if before:
        done = before["finetune_step"]
        load_state(network, before["avg_state_dict"], identity.checkpoint_path(args, "finetune_last"))
        learner.optimizer.load_state_dict(before["optimizer"])
        learner.scaler.load_state_dict(before["scaler"])
        meters.load_state_dict(before["meters"])
        loader.load_state_dict(before["loader"])
        state = {key: before[key] for key in state}
        if done >= steps:
            utils.tell(
                runtime, "finetuning is already finished: other flags and another --name start a new one"
            )
    record_of_data = dataset.record()
    progress = utils.Progress(f"{args.name}, finetuning", steps, done, runtime.is_main)

    def checkpoint(taken, *kinds):
        content = {
            "networks": {"student": METHODS[args.method].network_name(args, "student")},
            "predicting": ["student"],
            "avg_state_dict": network.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "scaler": learner.scaler.state_dict(),
            "meters": meters.state_dict(),
            "loader": loader.state_dict(),
            "run": run_id,
            "step": steps_before,
            "finetune_step": taken,
            "args": vars(args),
            "data": record_of_data,
        }
        identity.save(args, runtime, content | state, kinds)

    def stop(taken, status):
        if taken > done:
            meters.read()
            learner.sync_statistics()
            loader.position = taken
            checkpoint(taken, "finetune_last")
            path = identity.checkpoint_path(args, "finetune_last")
            progress.stopped(f"after step {taken} of finetuning", path)
        interrupt.end(status)

    def loss_of(part):
        images, targets = part
        loss = F.cross_entropy(learner(images), targets)
        return loss, {"finetune_loss": loss}

    runtime.finish_step()
    for step in range(done, steps):
        batch = next(loader)
        if interrupt.fault and runtime.processes == 1:
            stop(step, 2)
        runtime.seed(args.seed + 1, step)
        labeled, targets, *_ = runtime.shard(views(batch.images_l, batch.targets, None, loader.generator))
        meters.update(learner.learn(loss_of, [(labeled, targets)], step), steps_before + step)
        runtime.finish_step()
        progress.step()

        evaluating = (step + 1) % max(50, steps // 10) == 0 or step + 1 == steps
        if evaluating:
            learner.sync_statistics()
            record = {"finetune_loss": meters.read()["finetune_loss"]}
            test, confusion, val_top1 = measure_splits(runtime, members, dataset, views)
            record["finetune_top1"] = test["top1"]
            record |= {} if val_top1 is None else {"finetune_val_top1": val_top1}
            meters.reset()
            log.record(steps_before + step + 1, record)
            best = state["best_val_top1"]
            better = val_top1 is None or best is None or val_top1 > best
            if better:
                state = {"best_val_top1": val_top1, "finetune_top1": test["top1"]}
                if args.finetune:  # alone: the confusion matrix is that of the finetuned network
                    log.confusion(confusion, dataset.classes)
            checkpoint(step + 1, *(["finetune_best"] if better else []), "finetune_last")
            progress.line(f"step {step + 1}/{steps}  finetuned to {test['top1']:.2f} %")

        if status := interrupt.stops(runtime, wait=evaluating):
            stop(step + 1, status)
    progress.close()
    return state["finetune_top1"]


def evaluate(runtime, found):
    """``--evaluate``: measure the predictor of a checkpoint, or the mean of several, on the test images; needs
    no labels. Each network sees the images in the size of its run, normalised as there.

    Args:
        found: (arguments, content) of each checkpoint.
    """
    args, first = found[0][0], None
    paths = [each.resume for each, _ in found]
    runtime.on_main(lambda: identity.make_folder(args.results_path))
    walks, walks_of_views, sources = {}, {}, {}
    for number, (each, saved) in enumerate(found, 1):
        record = saved.get("data")
        with runtime.local_main_first():
            dataset = read_data(each, record, labels_given=False)
        first = first or dataset
        check_same_test(first, dataset, paths[0], each.resume)
        size = record["size"] if record else dataset.size
        members = saved_members(each, runtime, saved, dataset.num_classes, size)
        views = build_views(each, dataset, runtime)
        for role, network in members.items():
            name = role if len(found) == 1 else f"{role}{number}"
            walks[name], sources[name] = predictions(network, dataset.test, views, runtime), each.resume
            if args.tta != "none" and dataset.size:
                several = SeveralViews(network, args.tta)
                walks_of_views[name] = predictions(several, dataset.test, views, runtime)
        where = f" in {each.data_path}" if dataset.path else ""
        about = f"the {len(dataset.test)} test images of {each.dataset}{where}"
        utils.tell(runtime, *dataset.notes, f"evaluating {each.resume} on {about}")
        if dataset.size != size:
            utils.tell(runtime, f"evaluating at {dataset.size} pixels; the run was trained at {size}")
    seen = []
    test, confusion = score(runtime, walks, seen)
    predicted = gathered(seen, first.test, runtime)
    for name, path in sources.items() if len(found) > 1 else ():
        utils.tell(runtime, f"{path}: top-1 {test[f'{name}_top1']:.2f} %")

    # the record
    name = "+".join(dict.fromkeys(each.name for each, _ in found))
    folder = runtime.on_main(lambda: identity.free_folder(args.results_path, name))
    args.name = os.path.basename(folder)
    summary = summarize_together(args.name, found, runtime, test, confusion, first.classes)
    if walks_of_views:
        summary["tta_top1"] = score(runtime, walks_of_views)[0]["top1"]
    args.resume = paths if len(paths) > 1 else paths[0]
    log = RunLog(folder, args, start_step=None, tensorboard=False, active=runtime.is_main)
    log.record(max(saved["step"] for _, saved in found), test)
    log.confusion(confusion, first.classes)
    log.predictions(first.test, first.classes, predicted)
    log.summary(summary)
    utils.tell(runtime, f"the results of this evaluation are in {folder}")
    if runtime.is_main:
        print("\n".join(result_lines(summary)))


# ---------------------------------------------------------------- views of a command line


def saved_members(args, runtime, saved, num_classes, size):
    """The networks that predict, {role: network}, on the device: of a checkpoint, but which they are and how
    they are built is as the command line says."""
    method = METHODS[args.method]
    roles = method.predicting_roles(args)
    if "finetune_step" in saved and len(roles) > 1:
        utils.tell(runtime, f"{args.resume} has only the finetuned student: main.py ignores --ensemble")
        roles = ["student"]
    names = {role: method.network_name(args, role) for role in roles}
    options = ("stochastic_depth", "freeze_body", "bn_momentum", "bn_eps")
    options = {name: getattr(args, name) for name in options}
    checkpoint = Checkpoint(saved | {"networks": names, "predicting": roles}, args.resume)
    members = checkpoint.members(num_classes, size, **options)
    return {role: runtime.place(network) for role, network in members.items()}


def build_views(args, dataset, runtime):
    if dataset.size == 0:
        return PointViews(*args.jitter)
    return ImageViews(
        dataset.size,
        dataset.mean,
        dataset.std,
        flip=dataset.flip,
        crop=dataset.crop,
        randaug=tuple(args.randaug),
        labeled_view=args.labeled_view,
        strong_view=METHODS[args.method].uses_strong_view,
        static=runtime.static,
        compile=runtime.compile,
    )


def run(argv):
    """``main``, with errors as one sentence; returns the exit status."""
    return script.run("main.py", main, argv)


if __name__ == "__main__":
    script.execute(run, sys.argv[1:])
