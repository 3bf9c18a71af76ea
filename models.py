"""The networks, and the moving average of a network.

    model = build_model("wrn-28-2", num_classes=10, dropout=0.2)
    logits = model(images)                        # (N, 3, H, W) float -> (N, K) float, no softmax
    average = ModelEMA(model, decay=0.995)
    average.update(model)                         # after every optimiser step

From top to bottom: the classifier head, the networks written here (`WideResNet`, `ConvLarge`, `MLP`,
`LabelPerceptron`), networks of torchvision and timm, weights from files, a frozen body, `build_model`, the
two sizes printed at the start of a run, ensembles, and `ModelEMA`.

`torch.func.functional_call` with forward-mode differentiation (`torch.func.jvp`) works with every
convolutional network. In training mode it needs copies of the buffers, which batch norm updates. For this,
modules from torchvision and timm are set not to work in place. Vision transformers are the exception:
PyTorch's fused attention has no forward mode. All networks run in float64 and in channels-last memory
format, and all but torchvision's RegNet can be built on the meta device.
"""

import copy
import re
import sys
import zipfile
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

BN_EPS = 1e-3  # added to a batch norm's variance; the published code's value
SMALLEST_HALF = 2.0**-24  # the smallest positive float16: smaller stored probabilities are zero


class LinearHead(nn.Linear):
    """Dropout, then the classifier: (N, in_features) float -> (N, num_classes) float logits.

    The weights have the names of a plain `nn.Linear`, so that files of weights fit both. Weights start as in
    `nn.Linear`, uniform within 1 / sqrt(in_features); biases start at zero.
    """

    def __init__(self, in_features, num_classes, dropout=0.0, bias=True):
        super().__init__(in_features, num_classes, bias=bias)
        self.dropout = nn.Dropout(dropout)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, features):
        return super().forward(self.dropout(features))


# ----------------------------------------------------------------------------- networks written here


def _init_convolutions(network):
    """He-normal over fan-out, standard deviation sqrt(2 / (kernel area * out_channels)), as published."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def leaky_relu(x, slope):
    """Leaky ReLU, in place unless compiled: a compiled gradient uses the tensor that batch norm keeps
    anyway."""
    return F.leaky_relu(x, slope, inplace=not torch.compiler.is_compiling())


class WideResNetBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and leaky ReLU (pre-activation), plus a shortcut.

    (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride), float.

    If the shape changes, the first activated tensor is the input of both the first convolution and the 1x1
    convolution of the shortcut. Otherwise the shortcut is the block's input itself.
    """

    def __init__(self, in_channels, out_channels, stride, slope, bn_momentum):
        super().__init__()
        self.slope = slope
        self.bn1 = nn.BatchNorm2d(in_channels, eps=BN_EPS, momentum=bn_momentum)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=BN_EPS, momentum=bn_momentum)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        changes_shape = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if changes_shape else None

    def forward(self, x):
        activated = leaky_relu(self.bn1(x), self.slope)
        residual = self.conv1(activated)
        residual = self.conv2(leaky_relu(self.bn2(residual), self.slope))
        return residual.add_(x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """WRN-D-K of Zagoruyko and Komodakis (arXiv:1605.07146): depth D = 6n + 4, widening factor K.

    (N, 3, H, W) float -> (N, num_classes) float logits. One 3x3 convolution to 16 channels, three
    stages of n blocks with 16K, 32K and 64K channels, then batch norm, leaky ReLU, the mean over positions
    and the classifier. Stages 2 and 3 halve height and width. A depth of D = 8n + 5 has a
    fourth stage of 128K channels: WRN-37-2 is the network of USB's tables for STL-10.

    `slope` is the slope of the leaky ReLU on negative inputs: 0.2 in the published Meta Pseudo Labels code
    (other implementations take 0.1). `bn_momentum` is the share of the new batch in the running
    statistics, 1 - decay in TensorFlow's terms. All weights start as in the published code:
    convolutions He-normal over fan-out, the classifier uniform within 1 / sqrt(num_classes).
    """

    def __init__(self, depth, width, num_classes, dropout=0.0, slope=0.2, bn_momentum=0.01):
        super().__init__()
        stages = 4 if depth % 8 == 5 else 3
        if depth < 10 or (depth % 6 != 4 and stages == 3):
            raise ValueError(
                f"a WideResNet of depth {depth} does not exist: choose 10, 16, 22, 28, ... (6n + 4) or, with "
                "a fourth stage, 13, 21, 29, 37, ... (8n + 5)"
            )
        if width < 1:
            raise ValueError(f"a WideResNet needs a width of at least 1, not {width}")
        self.slope = slope
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks = []
        channels = 16
        for stage in range(stages):
            out_channels = 16 * width * 2**stage
            for index in range((depth - stages - 1) // (2 * stages)):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(WideResNetBlock(channels, out_channels, stride, slope, bn_momentum))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels, eps=BN_EPS, momentum=bn_momentum)
        self.head = LinearHead(channels, num_classes, dropout)
        _init_convolutions(self)
        nn.init.uniform_(self.head.weight, -(num_classes**-0.5), num_classes**-0.5)

    def forward(self, x):
        x = self.blocks(self.conv1(x))
        x = leaky_relu(self.bn(x), self.slope)
        return self.head(x.mean(dim=(2, 3)))


class FastCNN(nn.Module):
    """A small network for short trainings, after the one of cifar10-airbench (Jordan, arXiv:2404.00498).

    (N, 3, H, W) float -> (N, num_classes) float logits, for images of 16 to 64 pixels. A 2x2 convolution
    without padding to 24 channels, whose fixed weights whiten the patches of the training images
    (`fit`); then three groups of widths[0], widths[1] and widths[2] channels, each a 3x3
    convolution, max pooling by 2, batch norm, GELU, another 3x3 convolution, batch norm, GELU; at the end
    the maximum over positions and a classifier without bias, whose logits are divided by 9.

    The 3x3 convolutions start as the identity of their first input channels, the others random. Until
    `fit`, the first layer has random weights.
    """

    SCALE = 1 / 9  # of the logits (published)
    EPSILON = 5e-4  # added to the variances that whitening divides by (published)

    def __init__(self, widths, num_classes, dropout=0.0, bn_momentum=0.4):
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)
        layers, channels = [], 24
        for width in widths:
            for inputs, pool in ((channels, [nn.MaxPool2d(2)]), (width, [])):
                convolution = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
                nn.init.dirac_(convolution.weight[: min(inputs, width)])
                layers += [
                    convolution,
                    *pool,
                    nn.BatchNorm2d(width, eps=BN_EPS, momentum=bn_momentum),
                    nn.GELU(),
                ]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.head = LinearHead(channels, num_classes, dropout, bias=False)

    def forward(self, x):
        x = self.layers(F.gelu(self.whiten(x)))
        return self.head(x.amax(dim=(2, 3))) * self.SCALE

    @torch.no_grad()
    def fit(self, images):
        """Set the first layer to whiten the 2x2 patches of these images, (N, 3, H, W) float, normalised.

        Its first 12 filters are the eigenvectors of the patches' covariance, each divided by the square root
        of its eigenvalue (plus `EPSILON`), the last 12 their negatives. Computed on the CPU in float64, each
        eigenvector with its largest entry positive: the same on all devices.
        """
        patches = F.unfold(images.double().cpu(), 2).transpose(1, 2).flatten(0, 1)  # (N · positions, 12)
        variances, vectors = torch.linalg.eigh(torch.cov(patches.T))
        vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
        filters = (vectors / (variances + self.EPSILON).sqrt()).T.flip(0).view(12, 3, 2, 2)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


class ConvLarge(nn.Module):
    """The 13-layer network of the consistency methods (Pi model, mean teacher, Meta-Gradient).

    (N, 3, H, W) float -> (N, num_classes) float logits, H and W at least 12. Three 3x3 convolutions of
    128 channels, pool, drop; three of 256, pool, drop; 512 (3x3, no padding), 256 (1x1), 128 (1x1);
    the mean over positions; the classifier. Batch norm and leaky ReLU (slope 0.1) after each of the
    nine convolutions. Table 5 of arXiv:1703.01780; the weight normalisation that some versions
    add is left out, because batch norm undoes its scale.

    `drop` is the rate of the two dropouts behind the pools, a part of the published network. `dropout` is the
    rate before the classifier, as in every network here.
    """

    def __init__(self, num_classes, dropout=0.0, drop=0.5, bn_momentum=0.01):
        super().__init__()
        layers = []
        channels = 3
        for out_channels, kernel, padding, pool in [
            (128, 3, 1, False),
            (128, 3, 1, False),
            (128, 3, 1, True),
            (256, 3, 1, False),
            (256, 3, 1, False),
            (256, 3, 1, True),
            (512, 3, 0, False),
            (256, 1, 0, False),
            (128, 1, 0, False),
        ]:
            layers.append(nn.Conv2d(channels, out_channels, kernel, padding=padding, bias=False))
            layers.append(nn.BatchNorm2d(out_channels, eps=BN_EPS, momentum=bn_momentum))
            layers.append(nn.LeakyReLU(0.1))
            if pool:
                layers += [nn.MaxPool2d(2), nn.Dropout(drop)]
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.head = LinearHead(channels, num_classes, dropout)
        _init_convolutions(self)

    def forward(self, x):
        return self.head(self.features(x).mean(dim=(2, 3)))


class MLP(nn.Module):
    """Fully connected layers with tanh between them: (N, ...) float -> (N, sizes[-1]) float logits.

    `sizes` lists the units of every layer, input first: (2, 8, 8, 2) is the network of the paper's
    two-moons picture. An input of more than two dimensions is flattened. Initialised as PyTorch does:
    biases that are not zero matter here, since without them a tanh network starts as an odd function.
    """

    def __init__(self, sizes, dropout=0.0):
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(
                "an mlp needs at least an input and an output size, all positive: for example mlp-2-8-8-2"
            )
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes[:-1]))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(sizes[-2], sizes[-1])

    def forward(self, x):
        x = x.flatten(1)
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        return self.head(self.dropout(x))


class LabelPerceptron(MLP):
    """The trained part of the teacher in Reduced Meta Pseudo Labels: (N, K) class distributions -> (N, K)
    logits.

    Five layers, whose output is added to the logarithm of the given distribution. The last layer starts at
    zero, so that the softmax of the logits starts as the given distribution. Five layers and a start near the
    identity are the paper's; 128 hidden units are this project's choice.
    """

    def __init__(self, num_classes, hidden=128):
        super().__init__((num_classes, *[hidden] * 4, num_classes))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        x = x.to(self.head.weight.dtype)
        return x.clamp_min(SMALLEST_HALF).log() + super().forward(x)


# --------------------------------------------------------------------------- networks from torchvision

SMALL_IMAGE = 64  # pixels: up to this size, networks made for 224 pixels downsample less


def _torchvision():
    """torchvision's models, imported when needed: the import takes a second or two."""
    from torchvision import models

    return models


def _efficientnet_l2():
    """EfficientNet-L2 (arXiv:1911.04252): B0 with 4.3 times the channels and 5.3 times the layers."""
    models = _torchvision()
    config = partial(models.efficientnet.MBConvConfig, width_mult=4.3, depth_mult=5.3)
    stages = [  # expansion, kernel, stride, channels in, channels out, layers of B0
        config(1, 3, 1, 32, 16, 1),
        config(6, 3, 2, 16, 24, 2),
        config(6, 5, 2, 24, 40, 2),
        config(6, 3, 2, 40, 80, 3),
        config(6, 5, 1, 80, 112, 3),
        config(6, 5, 2, 112, 192, 4),
        config(6, 3, 1, 192, 320, 1),
    ]
    return models.EfficientNet(stages, dropout=0.5, norm_layer=partial(nn.BatchNorm2d, eps=BN_EPS))


def _torchvision_network(name):
    """A torchvision classifier by its torchvision name, with random weights and 1,000 outputs."""
    if name == "efficientnet_l2":
        return _efficientnet_l2()
    options = {}
    if name in ("googlenet", "inception_v3"):  # a single output in training, too; input as the weights expect
        options = {"aux_logits": False, "transform_input": True, "init_weights": True}
    return _torchvision().get_model(name, weights=None, **options)


def _find_head(model):
    """(name, module) of the classifier: timm's `get_classifier`, else the last `nn.Linear`, else the last
    `nn.Conv2d`.

    ValueError if none is found, or two classifiers. In torchvision's networks the classifier is the last
    module; in SqueezeNet it is a 1x1 convolution before the mean over positions.
    """
    if hasattr(model, "get_classifier"):
        head = model.get_classifier()  # two classifiers in networks made for distillation
        found = [(name, module) for name, module in model.named_modules() if module is head]
        if found:
            return found[-1]
        raise ValueError(
            f"{type(model).__name__} has two classifiers beside each other: choose another --model"
        )
    for kind in (nn.Linear, nn.Conv2d):
        found = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
        if found:
            return found[-1]
    raise ValueError(
        f"no classifier found in {type(model).__name__}: its last layer must be nn.Linear or nn.Conv2d"
    )


def head_of(model):
    """The module that turns features into logits: a `LinearHead`, SqueezeNet's 1x1 convolution, or timm's
    classifier."""
    return _find_head(model)[1]


def _replace_head(model, num_classes, dropout):
    """Give a torchvision classifier a new last layer, and `dropout` as the rate before it.

    If the network has dropouts beside its head (AlexNet, VGG, EfficientNet, ...), they get the rate.
    Otherwise the new head has a dropout of its own.
    """
    name, old = _find_head(model)
    parent = model.get_submodule(name.rpartition(".")[0])
    dropouts = [module for module in parent.children() if isinstance(module, nn.Dropout)]
    for module in dropouts:
        module.p = dropout
    if isinstance(old, nn.Conv2d):
        new = nn.Conv2d(old.in_channels, num_classes, old.kernel_size)
        nn.init.normal_(new.weight, std=0.01)  # SqueezeNet's own
        nn.init.zeros_(new.bias)
    else:
        rate = 0.0 if dropouts else dropout
        new = LinearHead(old.in_features, num_classes, rate, bias=old.bias is not None)
    model.set_submodule(name, new)


def _no_stochastic_depth(name):
    """The ValueError for --stochastic-depth with a network that has none."""
    return ValueError(
        f"{name} has no stochastic depth: leave --stochastic-depth out, or choose another --model, such "
        "as efficientnet-b0 or convnext-tiny"
    )


def _set_stochastic_depth(model, name, rate):
    """Set how often a block is left out in training: `rate` for the last block, evenly less for earlier ones.

    The probabilities of a torchvision network are scaled. EfficientNet leaves out block i = 0, ..., n - 1 of
    n with probability rate * i / n, as in the published code; other networks reach `rate` in the last block.
    ValueError for a network without stochastic depth.
    """
    from torchvision.ops import StochasticDepth

    blocks = [module for module in model.modules() if isinstance(module, StochasticDepth)]
    if not blocks:
        raise _no_stochastic_depth(name)
    own = 0.2 if isinstance(model, _torchvision().EfficientNet) else max(block.p for block in blocks)
    for block in blocks:
        block.p *= rate / own


def _reduce_less(model):
    """Adapt the first layers of a ResNet or EfficientNet to images of at most `SMALL_IMAGE` pixels.

    ResNet: a 3x3 convolution of stride 1 instead of 7x7 of stride 2, and no pooling (8-fold instead of
        32-fold downsampling). EfficientNet: stride 1 in the first three convolutions of stride 2 (4-fold), as
        the published code does for CIFAR and SVHN; the weights keep their shapes. Other networks stay
        unchanged.
    """
    if isinstance(model, _torchvision().ResNet):
        model.conv1 = nn.Conv2d(3, model.conv1.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    elif isinstance(model, _torchvision().EfficientNet):
        halving = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
        for convolution in halving[:3]:
            convolution.stride = (1, 1)


# --------------------------------------------------------------------------------- networks from timm

TIMM = "timm/"  # prefix of the names of timm's networks
INSTALL_TIMM = "pip install -r requirements-timm.txt"


def _timm():
    """The module timm (Wightman, PyTorch Image Models), which is optional; ValueError if it is not
    installed."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"networks named {TIMM}... need timm, which is not installed: {INSTALL_TIMM}"
        ) from error
    return timm


def _timm_config(name):
    """timm's configuration of timm/NAME or timm/NAME.TAG: input size, mean, std, address of the weights.

    ValueError for a network or a tag that timm does not know.
    """
    timm = _timm()
    name = name.removeprefix(TIMM)
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # a tag
        raise ValueError(
            f"timm {timm.__version__} says: {error} Leave the part behind the dot out"
        ) from error
    if config is None:
        raise ValueError(
            f"timm {timm.__version__} has no network {name!r}: timm.list_models('*resnet*') lists the "
            "networks with resnet in their names"
        )
    return config


def timm_statistics(name):
    """(mean, std), three numbers each, that the weights of timm/NAME expect of images; ValueError for a name
    that timm does not know, or without timm."""
    config = _timm_config(name)
    return config.mean, config.std


def _timm_network(name, num_classes, image_size, pretrained=False, **options):
    """A classifier of timm. A network with a fixed input size is built for `image_size` pixels.

    With `pretrained`, timm fetches the weights, resizes position embeddings and leaves out a head for another
    number of classes. `options` are timm's drop_rate and drop_path_rate; None means timm's default.
    """
    if _timm_config(name).fixed_input_size:
        options["img_size"] = image_size
    return _timm().create_model(name.removeprefix(TIMM), pretrained, num_classes=num_classes, **options)


# ------------------------------------------------------------------------------ weights from elsewhere

# Keys of a network's weights in a checkpoint, best first: this project's keys, then customary keys.
STATE_KEYS = ["avg_state_dict", "student_state_dict", "teacher_state_dict", "network", "state_dict", "model"]


def _read_state(path):
    """A state dict from a file, which is a plain state dict (also .safetensors) or a checkpoint.

    From a checkpoint of this project it takes the moving average, else the student, else the teacher.
    ValueError if the file cannot be read without running code, holds no state dict, or holds values that are
    not finite.
    """
    read = partial(torch.load, map_location="cpu", weights_only=True)
    if str(path).endswith(".safetensors"):
        try:
            from safetensors.torch import load_file as read
        except ImportError as error:
            raise ValueError(f"reading {path} needs safetensors: {INSTALL_TIMM}") from error
    try:
        if zipfile.is_zipfile(path):  # torch.load would not notice a wrong byte in a tensor
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
        state = read(path)
    except FileNotFoundError as error:
        raise ValueError(f"there is no weights file {path}: check --weights") from error
    except Exception as error:  # torch.load raises many kinds of exceptions for other files
        raise ValueError(
            f"{path} is not a weights file that loads without running code ({type(error).__name__}): "
            "save a state dict with torch.save(model.state_dict(), FILE) and give that"
        ) from error
    while isinstance(state, dict) and not all(isinstance(value, torch.Tensor) for value in state.values()):
        state = next((state[key] for key in STATE_KEYS if isinstance(state.get(key), dict)), None)
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds no state dict: save one with torch.save(model.state_dict(), FILE)")
    if spoilt := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"{path} holds values that are not finite, in {spoilt[0]}: take another file")
    return state


def _first_line(error):
    """The first line of an exception's message, else its type."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _nothing_published(name):
    """The ValueError for a network whose weights nobody publishes."""
    return ValueError(
        f"there are no published weights for {name}: give a file with --weights FILE, or leave --pretrained "
        "out"
    )


def _not_downloaded(name, url, error):
    """The ValueError for a failed download of weights; it says what to do without internet."""
    return ValueError(
        f"the weights of {name} cannot be downloaded ({_first_line(error)}): fetch {url} on another machine "
        "and give the file with --weights FILE, or start at random with --no-pretrained --no-freeze-body"
    )


def _download_state(name):
    """torchvision's default state dict for `name`; ValueError without one, or without internet."""
    try:
        weights = _torchvision().get_model_weights(name.replace("-", "_")).DEFAULT
    except ValueError as error:
        raise _nothing_published(name) from error
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # no internet, or a damaged file
        raise _not_downloaded(name, weights.url, error) from error


def _download_timm_state(name, num_classes, image_size):
    """The state dict with timm's weights for `name`; ValueError without weights, or without internet."""
    config = _timm_config(name)
    if not config.has_weights:
        raise _nothing_published(name)
    url = config.url
    if config.hf_hub_id:  # timm looks there first
        file = config.hf_hub_filename or "model.safetensors"
        url = f"https://huggingface.co/{config.hf_hub_id}/resolve/main/{file}"
    try:
        return _timm_network(name, num_classes, image_size, pretrained=True).state_dict()
    except Exception as error:  # the hub's client raises many kinds of exceptions
        raise _not_downloaded(name, url, error) from error


def _load_state(model, state, source):
    """Copy a state dict into `model`. If its head is missing or has another shape, the model keeps its own
    head.

    Accepts the prefixes of DistributedDataParallel and torch.compile, torchvision's older names in DenseNet,
    and for networks of timm everything that timm converts: older names, position embeddings for another image
    size. ValueError that names the first keys if other keys are missing, left over or of another shape;
    `source` names the origin of the state dict in the message.
    """
    advice = "Give --model the network that the weights were saved from, at the same image size"
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}
    if type(model).__name__ == "DenseNet":  # norm.1 became norm1
        state = {re.sub(r"\.(norm|conv)\.(\d)\.", r".\1\2.", key): value for key, value in state.items()}
    if getattr(model, "aux_logits", True) is False:  # the second outputs of GoogLeNet and Inception
        state = {key: value for key, value in state.items() if not key.lower().startswith("aux")}

    if convert := getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None):  # timm's
        try:
            state = convert(state, model)
        except Exception as error:  # many kinds of exceptions for the weights of another network
            raise ValueError(
                f"{source} does not fit this network ({_first_line(error)}). {advice}"
            ) from error

    own = model.state_dict()
    head_name, _ = _find_head(model)
    head = [key for key in own if key.startswith(head_name + ".")]
    found = [key for key in head if key in state]
    if not found or (found == head and any(state[key].shape != own[key].shape for key in head)):
        state = state | {key: own[key] for key in head}

    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    reshaped = [key for key in own if key in state and state[key].shape != own[key].shape]
    problems = []
    for words, keys in [("lacks", missing), ("has unknown", unknown), ("has another shape for", reshaped)]:
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            problems.append(f"{words} {', '.join(keys[:3])}{more}")
    if problems:
        raise ValueError(f"{source} does not fit this network: it {'; it '.join(problems)}. {advice}")
    model.load_state_dict(state, strict=False)  # files of old versions lack num_batches_tracked


# --------------------------------------------------------------------------------------- frozen bodies


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with constant statistics, in training too; the same keys as `nn.BatchNorm2d`.

    (N, C, H, W) -> the same shape. It is not a subclass of `nn.BatchNorm2d`, so that code that looks for
    batch norm, such as the conversion for --sync-bn, leaves it unchanged. Children of the batch norm (timm
    puts an activation there) are applied after it.
    """

    def __init__(self, batch_norm):
        super().__init__()
        self.eps = batch_norm.eps
        self.weight, self.bias = batch_norm.weight, batch_norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(batch_norm, name))
        for name, module in batch_norm.named_children():
            self.add_module(name, module)

    def forward(self, x):
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        for module in self.children():
            x = module(x)
        return x


def _freeze_body(model):
    """Let only the head learn: no gradients for other layers, and constant batch-norm statistics."""
    model.requires_grad_(False)
    head_of(model).requires_grad_(True)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, FrozenBatchNorm2d(child))


def disable_dropout(model):
    """Switch off dropout, in training mode too: the dropout layers, and the rates in networks of timm."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.0


# ------------------------------------------------------------------------------------- building by name


def _wrong_size(name, image_size, error):
    """The ValueError for images of a size that a network does not accept."""
    if image_size == 0:
        return ValueError(f"{name} takes images, and these are points: use mlp-2-...-K, such as mlp-2-8-8-2")
    return ValueError(
        f"{name} does not take images of {image_size} pixels ({_first_line(error)}): "
        "choose another --resize or --model"
    )


def build_model(
    name,
    num_classes,
    *,
    image_size=32,
    dropout=0.0,
    stochastic_depth=None,
    pretrained=False,
    weights=None,
    freeze_body=False,
    bn_momentum=None,
    bn_eps=None,
):
    """A network by its name: (N, 3, image_size, image_size) float -> (N, num_classes) float logits.

    name         wrn-D-K         WideResNet, depth D = 6n + 4 or 8n + 5, width K: wrn-28-2, wrn-37-2
                 mlp-A-B-...-Z   layers of A, B, ... Z units: A inputs, Z = num_classes: mlp-2-8-8-2
                 fastcnn-A-B-C   a small network of A, B, C channels for short trainings: fastcnn-64-128-128
                 convlarge       the 13-layer network of the consistency methods
                 efficientnet-b0 ... efficientnet-b7, efficientnet-l2
                 any classifier of torchvision.models: resnet50, alexnet, vgg16, densenet121, ...
                 timm/NAME       any classifier of timm, where it is installed: timm/convnext_tiny
    image_size   pixels; up to 64, torchvision's ResNet and EfficientNet downsample less in their first layers
    dropout      rate before the classifier; replaces the network's own rate
    stochastic_depth  probability that the last block is left out in training (earlier blocks: less); None:
                 the network's own. EfficientNet, ConvNeXt, Swin, MaxViT and more networks of timm have it;
                 ValueError for other networks
    pretrained   start from the weights that torchvision or timm publish, downloaded on first use
    weights      start from this file instead: a state dict or a checkpoint of this project. A head for
                 another number of classes is left out, as with `pretrained`.
    freeze_body  only the head learns
    bn_momentum  share of the new batch in the running statistics of batch norm (published code: 0.01)
    bn_eps       added to the variance in batch norm (published code: 1e-3). None, for both: the network's
                 own value. For the networks written here it is the published value; weight files of
                 torchvision and timm rely on theirs.

    ValueError, one sentence, for an unknown or impossible name, for images too small for the network, for a
    network without stochastic depth, and for weights that are not available or do not fit.
    """
    torchvision_name = name.replace("-", "_")
    if max(map(int, re.findall(r"\d+", name)), default=0) > 2**16:
        raise ValueError(f"{name} is too large for any machine: use numbers up to {2**16}")
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        model = WideResNet(int(match[1]), int(match[2]), num_classes, dropout)
    elif re.fullmatch(r"mlp(-\d+){2,}", name):
        sizes = [int(size) for size in name.split("-")[1:]]
        if sizes[-1] != num_classes:
            fitting = "-".join(["mlp", *map(str, sizes[:-1]), str(num_classes)])
            raise ValueError(
                f"{name} ends in {sizes[-1]} units but there are {num_classes} classes: use {fitting}"
            )
        model = MLP(sizes, dropout)
    elif match := re.fullmatch(r"fastcnn-(\d+)-(\d+)-(\d+)", name):
        model = FastCNN(list(map(int, match.groups())), num_classes, dropout)
    elif name == "convlarge":
        model = ConvLarge(num_classes, dropout)
    elif torchvision_name in [*_torchvision().list_models(module=_torchvision()), "efficientnet_l2"]:
        model = _torchvision_network(torchvision_name)
        _replace_head(model, num_classes, dropout)
        if image_size <= SMALL_IMAGE:
            _reduce_less(model)
    elif name.startswith(TIMM):
        rates = {"drop_rate": dropout, "drop_path_rate": stochastic_depth}
        try:
            model = _timm_network(name, num_classes, image_size, **rates)
        except AssertionError as error:
            raise _wrong_size(name, image_size, error) from error
        except TypeError as error:  # an unexpected keyword
            raise _no_stochastic_depth(name) from error
        _find_head(model)
    else:
        raise ValueError(
            f"there is no network {name!r}: use wrn-D-K (such as wrn-28-2), mlp-A-...-Z (such as "
            "mlp-2-8-8-2), convlarge, efficientnet-b0 to -b7 or -l2, a classifier of torchvision.models "
            "(such as resnet50), or a network of timm (such as timm/convnext_tiny)"
        )
    if stochastic_depth is not None and not name.startswith(TIMM):
        _set_stochastic_depth(model, name, stochastic_depth)
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = norm.momentum if bn_momentum is None else bn_momentum
        norm.eps = norm.eps if bn_eps is None else bn_eps
    if not isinstance(model, MLP):
        try:
            _run_on_meta(model, (3, image_size, image_size))
        except (RuntimeError, AssertionError) as error:
            raise _wrong_size(name, image_size, error) from error

    if weights is not None:
        _load_state(model, _read_state(weights), weights)
    elif pretrained and name.startswith(TIMM):
        _load_state(model, _download_timm_state(name, num_classes, image_size), f"timm's file for {name}")
    elif pretrained:
        if isinstance(model, _torchvision().ResNet) and image_size <= SMALL_IMAGE:
            raise ValueError(
                f"the published weights of {name} are for large images; at {image_size} pixels its first "
                "layer has another shape: enlarge the images with --resize 224, or leave --pretrained out"
            )
        _load_state(model, _download_state(name), f"torchvision's file for {name}")
    if freeze_body:
        _freeze_body(model)
    return model


# --------------------------------------------------------------------------- parameters and operations


def _run_on_meta(model, shape):
    """One forward pass of one image on the meta device: shapes are checked, nothing is computed.

    `model` stays unchanged and may be on any device.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tensors = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    dtype = next(model.parameters()).dtype
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            torch.func.functional_call(model, tensors, (torch.empty(1, *shape, dtype=dtype, device="meta"),))
    finally:
        for module, training in modes:
            module.training = training


def count_parameters(model):
    """The number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model, shape):
    """Multiply-adds of one forward pass of one image, in matrix products and convolutions.

    `shape` is the shape of an input without the batch, (3, 32, 32) or (2,); a single number is the side of a
    square image. Computed on the meta device, with hardly any time and memory.
    """
    with FlopCounterMode(display=False) as counter:
        _run_on_meta(model, (3, shape, shape) if isinstance(shape, int) else tuple(shape))
    return counter.get_total_flops() // 2  # the counter counts a multiply-add as two


# ------------------------------------------------------------------------------------------- ensembles


def mean_prediction(logits):
    """Average the probabilities of several networks: a list of their logits (N, K) -> logits (N, K) of the
    mean.

    The result is the logarithm of the sum of the probabilities; softmax turns the sum into the mean. The
    logits of a single network are returned unchanged.
    """
    if len(logits) == 1:
        return logits[0]
    return torch.stack([F.log_softmax(each, dim=1) for each in logits]).logsumexp(dim=0)


class Ensemble(nn.Module):
    """Several networks as one: images → float32 logits (N, K) of the mean of their probabilities."""

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images):
        return mean_prediction([member(images).float() for member in self.members])


class SeveralViews(nn.Module):
    """A network that sees each image several times: float32 logits (N, K) of the mean of its probabilities.

    `mirror`: the image and its mirror image. `shift`: both also moved by a pixel up and left, and by a pixel
    down and right, with the outermost pixels repeated (the six views of cifar10-airbench).
    """

    CHOICES = ("none", "mirror", "shift")

    def __init__(self, network, views):
        super().__init__()
        self.network, self.shifts = network, (0, 1, -1) if views == "shift" else (0,)

    def forward(self, images):
        padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
        height, width = images.shape[2:]
        logits = []
        for shift in self.shifts:
            moved = padded[:, :, 1 + shift : 1 + shift + height, 1 + shift : 1 + shift + width]
            logits += [self.network(moved).float(), self.network(moved.flip(3)).float()]
        return mean_prediction(logits)


# --------------------------------------------------------------------------------- the moving average


class ModelEMA:
    """An exponential moving average of a network: the model that is evaluated and saved.

    `network` is a copy of the given network, in evaluation mode and without gradients. `update`
    averages parameters and batch-norm statistics alike; integer buffers (counts of batches) are
    copied. The decay is ramped, min(decay, (1 + t) / (10 + t)) with t the number of updates so far,
    as in the published code, so that the average does not remember the initialisation.
    """

    def __init__(self, network, decay):
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"the decay of a moving average lies between 0 and 1, not at {decay}")
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay
        # counted on the device: a number in the graph would make XLA compile each step
        self.updates = torch.zeros((), dtype=torch.int64, device=next(network.parameters()).device)

    @torch.no_grad()
    def update(self, network):
        """Move the average toward `network`, which has the same parameters and buffers in the same order.

        Everything stays on the device.
        """
        t = self.updates.to(next(self.network.parameters()).dtype)
        decay = ((1 + t) / (10 + t)).clamp_max(self.decay)
        ours = [*self.network.parameters(), *self.network.buffers()]
        theirs = [*network.parameters(), *network.buffers()]
        pairs = list(zip(ours, theirs, strict=True))
        averaged = [(a, b) for a, b in pairs if a.is_floating_point()]
        copied = [(a, b) for a, b in pairs if not a.is_floating_point()]
        if averaged:
            a, b = zip(*averaged, strict=True)
            # a + (1 - decay) · (b - a) in three launches; with decay as a tensor, lerp launches once per
            # tensor
            change = torch._foreach_sub(b, a)
            torch._foreach_mul_(change, 1.0 - decay)
            torch._foreach_add_(a, change)
        if copied:
            a, b = zip(*copied, strict=True)
            torch._foreach_copy_(a, b)
        self.updates += 1
