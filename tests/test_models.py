"""The networks of models.py: sizes, the published block, weights from elsewhere, and the moving average."""

import copy
import math
import sys
import urllib.error

import pytest
import torch
import torchvision
from torch import nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from models import (
    LabelPerceptron,
    LinearHead,
    ModelEMA,
    SeveralViews,
    WideResNetBlock,
    build_model,
    count_flops,
    count_parameters,
    head_of,
)


def on_meta(*args, **options):
    with torch.device("meta"):
        return build_model(*args, **options)


def randomise_norms(model):
    """Batch norms as after training: weights, biases and statistics that differ from channel to channel."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    "name, classes, image_size, parameters",
    [
        ("wrn-28-2", 10, 32, 1_467_610),
        ("wrn-28-8", 100, 32, 23_401_012),
        ("wrn-28-10", 10, 32, 36_479_194),
        ("resnet18", 1000, 224, 11_689_512),
        ("resnet34", 1000, 224, 21_797_672),
        ("resnet50", 1000, 224, 25_557_032),
        ("efficientnet-b0", 1000, 224, 5_288_548),
        ("efficientnet-b7", 1000, 600, 66_347_960),
        ("efficientnet-l2", 1000, 224, 480_309_308),
        ("alexnet", 1000, 224, 61_100_840),
        ("vgg16", 1000, 224, 138_357_544),
        ("squeezenet1_0", 1000, 224, 1_248_424),
        ("densenet121", 1000, 224, 7_978_856),
        ("mlp-2-8-8-2", 2, 32, 2 * 8 + 8 + 8 * 8 + 8 + 8 * 2 + 2),
    ],
)
def test_parameter_counts_are_the_published_ones(name, classes, image_size, parameters):
    assert count_parameters(on_meta(name, classes, image_size=image_size)) == parameters


def test_wide_resnet_takes_any_depth_and_width():
    def by_hand(depth, width, classes):
        total, channels = 3 * 16 * 9, 16
        for stage in range(3):
            out = 16 * width * 2**stage
            for index in range((depth - 4) // 6):
                total += 2 * channels + 9 * channels * out + 2 * out + 9 * out * out
                if channels != out or (stage > 0 and index == 0):
                    total += channels * out
                channels = out
        return total + 2 * channels + channels * classes + classes

    for depth, width, classes in [(10, 1, 10), (16, 3, 7), (22, 4, 2), (40, 2, 100)]:
        assert count_parameters(on_meta(f"wrn-{depth}-{width}", classes)) == by_hand(depth, width, classes)


def test_flops_by_hand():
    assert count_flops(build_model("mlp-2-8-8-2", 2), (2,)) == 2 * 8 + 8 * 8 + 8 * 2
    stem = 64 * 9 * 3 * 16
    first = 64 * 9 * (16 * 16 + 16 * 16)
    second = 16 * (9 * (16 * 32 + 32 * 32) + 16 * 32)
    third = 4 * (9 * (32 * 64 + 64 * 64) + 32 * 64)
    assert (
        count_flops(build_model("wrn-10-1", 10, image_size=8), 8) == stem + first + second + third + 64 * 10
    )
    assert count_flops(on_meta("resnet50", 1000, image_size=224), (3, 224, 224)) == 4_089_184_256


def test_counting_flops_changes_nothing():
    model = build_model("wrn-10-1", 10)
    model.blocks[1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    assert count_flops(model, 16) > 0
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert next(model.parameters()).device.type == "cpu"


# --------------------------------------------------------------------------------------- one step each


@pytest.mark.parametrize(
    "name, image_size",
    [
        ("wrn-10-1", 8),
        ("wrn-16-2", 12),
        ("convlarge", 12),
        ("fastcnn-8-16-16", 16),
        ("resnet18", 16),
        ("resnet50", 16),
        ("efficientnet-b0", 16),
        ("densenet121", 32),
        ("squeezenet1_1", 32),
        ("shufflenet_v2_x0_5", 32),
        ("regnet_x_400mf", 32),
        ("mlp-192-16-5", 8),
    ],
)
def test_one_training_step(name, image_size):
    model = build_model(name, 5, image_size=image_size)
    images, targets = torch.randn(4, 3, image_size, image_size), torch.tensor([0, 1, 2, 3])
    logits = model(images)
    assert logits.shape == (4, 5) and logits.dtype == torch.float32
    loss = F.cross_entropy(logits, targets)
    loss.backward()
    fixed = ["whiten.weight"] if name.startswith("fastcnn") else []
    assert [key for key, p in model.named_parameters() if p.grad is None] == fixed
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    with torch.no_grad():
        after = model(images)
    assert loss.isfinite() and after.isfinite().all()
    assert not torch.equal(after, logits)


@pytest.mark.parametrize("name", ["wrn-10-1", "wrn-16-2", "convlarge", "resnet18"])
def test_no_parameter_is_dead(name):
    model = build_model(name, 10, image_size=16).double()
    F.cross_entropy(model(torch.randn(8, 3, 16, 16).double()), torch.arange(8)).backward()
    assert [key for key, p in model.named_parameters() if p.grad.abs().max() < 1e-9] == []


def test_two_moons_network():
    model = build_model("mlp-2-8-8-2", 2)
    x = torch.randn(5, 2)
    a, b = model.hidden
    hidden = torch.tanh(torch.tanh(x @ a.weight.T + a.bias) @ b.weight.T + b.bias)
    torch.testing.assert_close(model(x), hidden @ model.head.weight.T + model.head.bias)


def test_an_mlp_drops_units_before_its_head():
    model = build_model("mlp-3-16-8-2", 2, dropout=0.5)
    x = torch.randn(50, 3)
    a, b = model.hidden
    hidden = torch.tanh(torch.tanh(x @ a.weight.T + a.bias) @ b.weight.T + b.bias)
    torch.manual_seed(1)
    logits = model(x)
    torch.manual_seed(1)
    dropped = F.dropout(hidden, 0.5)
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    torch.testing.assert_close(logits, dropped @ model.head.weight.T + model.head.bias)


def test_convlarge_is_the_published_table():
    """Table 5 of arXiv:1703.01780, layer by layer, with the running statistics of batch norm."""
    model = build_model("convlarge", 10, bn_momentum=0.3).double().eval()
    randomise_norms(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.3)}
    parameters = iter([p for name, p in model.named_parameters() if not name.startswith("head")])
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        x = images
        widths = [128, 128, 128, 256, 256, 256, 512, 256, 128]
        for number, (width, norm) in enumerate(zip(widths, norms, strict=True)):
            weight, scale, shift = (next(parameters) for _ in range(3))
            kernel = 3 if number < 7 else 1
            assert weight.shape == (width, x.shape[1], kernel, kernel)
            x = F.conv2d(x, weight, padding=1 if number < 6 else 0)
            x = F.batch_norm(x, norm.running_mean, norm.running_var, scale, shift, eps=1e-3)
            x = torch.where(x > 0, x, 0.1 * x)
            if number in (2, 5):
                x = F.max_pool2d(x, 2)
        assert x.shape[2:] == (6, 6)
        expected = x.mean(dim=(2, 3)) @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(images), expected)


def test_googlenet_takes_the_input_that_its_weights_expect():
    """They were trained on levels from -1 to 1, and ours are normalised as those of ImageNet."""
    model = build_model("googlenet", 5, image_size=64).double().eval()
    plain = copy.deepcopy(model)
    plain.transform_input = False
    levels = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    with torch.no_grad():
        ours, expected = model((levels - mean) / std), plain(2 * levels - 1)
    assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_what_is_built_here_of_torchvisions_parts_starts_as_published():
    """The first layer of a ResNet for small images, and EfficientNet-L2's batch norm."""
    first = build_model("resnet18", 10, image_size=32).conv1.weight
    assert first.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)
    norms = [m for m in on_meta("efficientnet-l2", 10).modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.eps for norm in norms} == {1e-3}


# ----------------------------------------------------------------------------------- the published block


@pytest.mark.parametrize("channels, out_channels, stride", [(4, 6, 1), (4, 4, 2), (4, 8, 2), (4, 4, 1)])
def test_block_follows_the_preactivation_rule(channels, out_channels, stride):
    block = WideResNetBlock(channels, out_channels, stride, slope=0.2, bn_momentum=0.01).double()
    randomise_norms(block)
    x = torch.randn(3, channels, 6, 6, dtype=torch.float64)

    def normalise_and_activate(x, norm):
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        variance = (x - mean).square().mean(dim=(0, 2, 3), keepdim=True)
        x = (x - mean) / (variance + 1e-3).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        return torch.where(x > 0, x, 0.2 * x)

    activated = normalise_and_activate(x, block.bn1)
    residual = F.conv2d(activated, block.conv1.weight, stride=stride, padding=1)
    residual = F.conv2d(normalise_and_activate(residual, block.bn2), block.conv2.weight, padding=1)
    if (channels, stride) == (out_channels, 1):
        expected = x + residual  # the input as it came in, and no parameters for it
        assert count_parameters(block) == 2 * 2 * channels + 2 * 9 * channels**2
    else:
        expected = F.conv2d(activated, block.shortcut.weight, stride=stride) + residual
    torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10)


def test_wide_resnet_is_stem_blocks_and_head():
    model = build_model("wrn-10-1", 10).double().eval()
    randomise_norms(model)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        out = F.conv2d(x, model.conv1.weight, padding=1)
        for block, shape in zip(model.blocks, [(16, 16), (32, 8), (64, 4)], strict=True):
            out = block(out)
            assert out.shape[1:] == (shape[0], shape[1], shape[1])
        norm = model.bn
        out = (out - norm.running_mean.view(-1, 1, 1)) / (norm.running_var + 1e-3).sqrt().view(-1, 1, 1)
        out = out * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        features = torch.where(out > 0, out, 0.2 * out).flatten(2).mean(2)
        torch.testing.assert_close(model(x), features @ model.head.weight.T + model.head.bias)


def test_initialisation_and_batch_norm_are_the_published_ones():
    model = build_model("wrn-16-4", 10)
    for convolution in (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 4000):
        fan_out = convolution.kernel_size[0] ** 2 * convolution.out_channels
        assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
    weight = head_of(model).weight
    assert 0.95 / math.sqrt(10) < weight.abs().max() <= 1 / math.sqrt(10)
    assert not head_of(model).bias.any()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    norms = [
        m for m in build_model("resnet18", 10, bn_momentum=0.3).modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert {m.momentum for m in norms} == {0.3}


# ------------------------------------------------------------------------ what every network must allow


def test_the_perceptron_of_labels_starts_as_the_identity():
    """To the precision of float16, with probabilities that have become zero there."""
    torch.manual_seed(0)
    network = LabelPerceptron(10)
    assert len([module for module in network.modules() if isinstance(module, torch.nn.Linear)]) == 5
    given = F.softmax(6 * torch.randn(100, 10), dim=1).half()
    given[0] = torch.eye(10)[3]
    torch.testing.assert_close(F.softmax(network(given), dim=1), given.float(), rtol=2e-3, atol=1e-6)
    loss = F.cross_entropy(network(given), torch.arange(100) % 10)
    loss.backward()
    assert torch.isfinite(loss) and network.head.weight.grad.norm() > 0  # and it can leave it


@pytest.mark.parametrize(
    "name", ["wrn-10-1", "mlp-192-8-8-3", "resnet18", "convlarge", "densenet121", "fastcnn-8-8-8"]
)
def test_forward_mode_derivative_in_training_mode(name):
    """The Jacobian-vector product in the parameters agrees with a central difference, batch norm training."""
    size = {"densenet121": 32, "convlarge": 12, "fastcnn-8-8-8": 16}.get(name, 8)
    model = build_model(name, 3, image_size=size).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    direction = {key: torch.randn_like(p) * p.abs().mean() for key, p in parameters.items()}

    def logits(parameters):
        buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
        return functional_call(model, (parameters, buffers), (images,))

    _, derivative = jvp(logits, (parameters,), (direction,))
    step = 1e-7
    plus = logits({key: p + step * direction[key] for key, p in parameters.items()})
    minus = logits({key: p - step * direction[key] for key, p in parameters.items()})
    torch.testing.assert_close(derivative, (plus - minus) / (2 * step), rtol=1e-4, atol=1e-4)
    assert derivative.abs().max() > 1e-3


@pytest.mark.parametrize("name", ["wrn-10-1", "resnet18", "efficientnet-b0", "convlarge", "fastcnn-8-8-8"])
def test_float64_and_channels_last_give_the_same(name):
    model = build_model(name, 4, image_size=16).eval()
    randomise_norms(model)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        plain = model(images)
        last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        double = model.double()(images.double())
    assert double.dtype == torch.float64
    scale = double.abs().max().item()
    torch.testing.assert_close(last, plain, rtol=1e-3, atol=1e-4 * scale)
    torch.testing.assert_close(plain.double(), double, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("name", ["resnet50", "efficientnet-b0", "alexnet", "vgg16_bn", "mobilenet_v3_small"])
def test_nothing_is_set_to_work_in_place(name):
    model = on_meta(name, 10, image_size=64)
    assert not any(getattr(module, "inplace", False) for module in model.modules())


@pytest.mark.parametrize(
    "name, places",
    [
        ("wrn-10-1", {"head.dropout": 0.3}),
        ("mlp-2-8-8-2", {"dropout": 0.3}),
        ("convlarge", {"features.10": 0.5, "features.21": 0.5, "head.dropout": 0.3}),
        ("resnet18", {"fc.dropout": 0.3}),
        ("densenet121", {"classifier.dropout": 0.3}),
        ("googlenet", {"dropout": 0.3}),
        ("efficientnet-b0", {"classifier.0": 0.3}),
        ("squeezenet1_0", {"classifier.0": 0.3}),
        ("vgg16", {"classifier.2": 0.3, "classifier.5": 0.3}),
    ],
)
def test_dropout_stands_before_the_classifier(name, places):
    model = on_meta(name, 2, image_size=64, dropout=0.3)
    rates = {key: m.p for key, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}
    assert rates == places


@pytest.mark.parametrize(
    "name, count, divisor",
    [("efficientnet-b0", 16, 16), ("convnext-tiny", 18, 17), ("swin-t", 12, 11)],
)
def test_stochastic_depth_grows_from_block_to_block(name, count, divisor):
    """EfficientNet's by the published i/n; without a rate it is the network's own."""
    rates, own = (
        [m.p for m in on_meta(name, 2, **options).modules() if isinstance(m, StochasticDepth)]
        for options in ({"image_size": 64, "stochastic_depth": 0.6}, {"image_size": 64})
    )
    assert rates == pytest.approx([0.6 * i / divisor for i in range(count)])
    assert own == pytest.approx(
        [(0.1 if name == "convnext-tiny" else 0.2) * i / divisor for i in range(count)]
    )


@pytest.mark.parametrize("name", ["wrn-10-1", "mlp-2-8-8-2", "resnet18"])
def test_stochastic_depth_is_refused_where_there_is_none(name):
    with pytest.raises(ValueError, match=f"{name} has no stochastic depth: leave --stochastic-depth out"):
        on_meta(name, 2, stochastic_depth=0.0)


def test_head_drops_features_in_training_only():
    head = LinearHead(1000, 3, dropout=0.25)
    nn.init.constant_(head.weight, 1e-3)
    features = torch.ones(64, 1000)
    with torch.no_grad():
        training, evaluation = head(features), head.eval()(features)
    torch.testing.assert_close(evaluation, torch.ones(64, 3))
    assert 0.005 < training.std() < 0.04  # sqrt(0.25 / 0.75 / 1000) = 0.018
    assert training.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    "name, head, features",
    [
        ("alexnet", "classifier.6", 4096),
        ("vgg16", "classifier.6", 4096),
        ("squeezenet1_1", "classifier.1", 512),
        ("densenet121", "classifier", 1024),
        ("resnet18", "fc", 512),
        ("efficientnet-b1", "classifier.1", 1280),
        ("mobilenet_v2", "classifier.1", 1280),
        ("convnext_tiny", "classifier.2", 768),
        ("vit_b_32", "heads.head", 768),
        ("swin_t", "head", 768),
        ("googlenet", "fc", 1024),
    ],
)
def test_head_is_found_and_replaced(name, head, features):
    model = on_meta(name, 7, image_size=224)
    assert head_of(model) is model.get_submodule(head)
    assert head_of(model).weight.shape[:2] == (7, features)
    assert model.eval()(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 7)


@pytest.mark.parametrize(
    "name, image_size, last",
    [
        ("resnet18", 32, 4),
        ("resnet18", 64, 8),
        ("resnet18", 96, 3),
        ("efficientnet-b0", 32, 8),
        ("efficientnet-b0", 96, 3),
    ],
)
def test_small_images_are_reduced_less(name, image_size, last):
    model = on_meta(name, 10, image_size=image_size).eval()
    shapes = []
    model.avgpool.register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(inputs[0].shape[2:]))
    )
    model(torch.empty(1, 3, image_size, image_size, device="meta"))
    assert shapes == [(last, last)]


@pytest.mark.parametrize(
    "name, classes, image_size, words",
    [
        ("wrn-27-2", 10, 32, "6n \\+ 4"),
        ("wrn-4-2", 10, 32, "6n \\+ 4"),
        ("wrn-28-0", 10, 32, "width of at least 1"),
        ("wrn-28", 10, 32, "wrn-D-K"),
        ("lenet", 10, 32, "wrn-D-K.*mlp-.*convlarge.*efficientnet.*torchvision"),
        ("mlp-2-8-8-2", 3, 32, "use mlp-2-8-8-3"),
        ("mlp-2-0-2", 2, 32, "all positive"),
        ("convlarge", 10, 8, "8 pixels.*--resize"),
        ("alexnet", 10, 32, "32 pixels.*--resize"),
        ("vit_b_32", 10, 64, "64 pixels.*--resize"),
    ],
)
def test_impossible_networks_are_refused_in_one_sentence(name, classes, image_size, words):
    with pytest.raises(ValueError, match=words) as error:
        on_meta(name, classes, image_size=image_size)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------ weights from elsewhere


def same_weights(model, state, but=()):
    return all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key not in but)


def test_weights_file_round_trip(tmp_path):
    source = build_model("wrn-10-1", 10)
    randomise_norms(source)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    model = build_model("wrn-10-1", 10, weights=tmp_path / "weights.pt")
    assert same_weights(model, source.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval()(images), source.eval()(images))


def test_weights_from_a_checkpoint_prefer_the_average(tmp_path):
    teacher, student = build_model("wrn-10-1", 10), build_model("wrn-10-1", 10)
    average = ModelEMA(build_model("wrn-10-1", 10), 0.9)
    state = {"step": 3, "teacher_state_dict": teacher.state_dict(), "args": {"model": "wrn-10-1"}}
    for key, value, expected in [
        (None, None, teacher),
        ("student_state_dict", {f"module.{k}": v for k, v in student.state_dict().items()}, student),
        ("avg_state_dict", {"network": average.network.state_dict()}, average.network),
    ]:
        if key:
            state[key] = value
        torch.save(state, tmp_path / "checkpoint.pt")
        model = build_model("wrn-10-1", 10, weights=tmp_path / "checkpoint.pt")
        assert same_weights(model, expected.state_dict())


@pytest.mark.parametrize("name, size", [("wrn-10-1", 16), ("resnet18", 96), ("squeezenet1_1", 64)])
def test_head_for_other_classes_is_left_out(name, size, tmp_path):
    source = build_model(name, 10, image_size=size)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    model = build_model(name, 3, image_size=size, weights=tmp_path / "weights.pt")
    own = {id(p) for p in head_of(model).parameters()}
    head = [key for key, p in model.named_parameters() if id(p) in own]
    assert len(head) == 2 and head_of(model).weight.shape[0] == 3 and not head_of(model).bias.any()
    assert same_weights(model, source.state_dict(), but=head)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    file = tmp_path / "weights.pt"
    torch.save(build_model("wrn-10-2", 10).state_dict(), file)
    with pytest.raises(ValueError, match=r"another shape for blocks\.0\.conv1\.weight.* more"):
        build_model("wrn-10-1", 10, weights=file)
    torch.save(build_model("wrn-16-1", 10).state_dict(), file)
    with pytest.raises(ValueError, match=r"unknown blocks\.3\.bn1\.weight"):
        build_model("wrn-10-1", 10, weights=file)
    state = build_model("wrn-10-1", 10).state_dict()
    del state["blocks.1.bn2.running_mean"]
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"lacks blocks\.1\.bn2\.running_mean\b"):
        build_model("wrn-10-1", 10, weights=file)


class NotATensor:
    """Something that a weights file must not contain, since reading it runs code."""


def test_files_that_are_no_weights_are_refused(tmp_path):
    file = tmp_path / "weights.pt"
    with pytest.raises(ValueError, match="no weights file"):
        build_model("wrn-10-1", 10, weights=file)
    file.write_bytes(b"\x89PNG, not weights")
    with pytest.raises(ValueError, match="not a weights file"):
        build_model("wrn-10-1", 10, weights=file)
    torch.save({"model": NotATensor()}, file)
    with pytest.raises(ValueError, match="without running code"):
        build_model("wrn-10-1", 10, weights=file)
    torch.save({"step": 1, "args": {"lr": 0.1}}, file)
    with pytest.raises(ValueError, match="holds no state dict"):
        build_model("wrn-10-1", 10, weights=file)
    good = build_model("wrn-10-1", 10).state_dict()
    torch.save(good, file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of a weight, which torch.load takes as it is
    file.write_bytes(content)
    with pytest.raises(ValueError, match="not a weights file"):
        build_model("wrn-10-1", 10, weights=file)
    good["conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(good, file)
    with pytest.raises(ValueError, match=r"values that are not finite, in conv1\.weight"):
        build_model("wrn-10-1", 10, weights=file)


def test_pretrained_reads_torchvisions_file(tmp_path, monkeypatch):
    """From torchvision's cache folder, where a downloaded file would lie."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = torchvision.models.squeezenet1_1(weights=None)
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(source.state_dict(), folder / url.rpartition("/")[2])
    head = ("classifier.1.weight", "classifier.1.bias")
    model = build_model("squeezenet1_1", 5, image_size=64, pretrained=True)
    assert same_weights(model, source.state_dict(), but=head) and head_of(model).weight.shape[0] == 5
    model = build_model("squeezenet1_1", 1000, image_size=64, pretrained=True)
    assert same_weights(model, source.state_dict())


def test_networks_of_timm_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"need timm.*pip install -r requirements-timm\.txt"):
        build_model("timm/resnet18", 5)


def test_pretrained_without_network_names_the_way_out(tmp_path, monkeypatch):
    def no_network(*args, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    with pytest.raises(ValueError, match=r"no route to host.*https://.*--weights FILE.*--no-pretrained"):
        build_model("squeezenet1_1", 5, image_size=64, pretrained=True)
    with pytest.raises(ValueError, match=r"no published weights for wrn-10-1.*--weights FILE"):
        build_model("wrn-10-1", 5, pretrained=True)
    with pytest.raises(ValueError, match=r"--resize 224"):
        build_model("resnet18", 5, image_size=32, pretrained=True)


def test_old_densenet_names_are_understood(tmp_path):
    source = build_model("densenet121", 5)
    state = source.state_dict()
    old = {}
    for key, value in state.items():
        for part in ("norm1", "norm2", "conv1", "conv2"):
            key = key.replace(f".{part}.", f".{part[:4]}.{part[4]}.") if "denselayer" in key else key
        old[key] = value
    assert len(set(old) - set(state)) > 500
    torch.save(old, tmp_path / "weights.pt")
    assert same_weights(build_model("densenet121", 5, weights=tmp_path / "weights.pt"), state)


def test_the_second_outputs_in_a_file_of_googlenet_are_left_out(tmp_path):
    source = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    model = build_model("googlenet", 1000, image_size=64, weights=tmp_path / "weights.pt")
    assert any(key.startswith("aux1.") for key in source.state_dict())
    assert same_weights(model, source.state_dict())


# --------------------------------------------------------------------------------------- frozen bodies


@pytest.mark.parametrize("name", ["wrn-10-1", "resnet18", "efficientnet-b0", "squeezenet1_1"])
def test_only_the_head_of_a_frozen_body_learns(name, tmp_path):
    size = 32 if name == "squeezenet1_1" else 16
    trained = build_model(name, 9, image_size=size)
    randomise_norms(trained)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    model = build_model(name, 4, image_size=size, weights=tmp_path / "weights.pt", freeze_body=True).train()
    before = copy.deepcopy(model.state_dict())
    learning = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in learning} == {id(p) for p in head_of(model).parameters()}
    optimiser = torch.optim.SGD(learning, lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        logits = model(torch.randn(4, 3, size, size))
        # away from zero, where SqueezeNet's last ReLU passes no gradient
        (logits.square().sum() - head_of(model).bias.sum()).backward()
        optimiser.step()
    assert logits.isfinite().all()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    head = {key for key, value in model.named_parameters() if value.requires_grad}
    assert changed == head


def test_frozen_batch_norm_computes_as_in_evaluation(tmp_path):
    source = build_model("resnet18", 4, image_size=32)
    randomise_norms(source)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    frozen = build_model("resnet18", 4, image_size=32, weights=tmp_path / "weights.pt", freeze_body=True)
    frozen = nn.SyncBatchNorm.convert_sync_batchnorm(frozen).train()
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(frozen(images), source.eval()(images))
    assert frozen.state_dict().keys() == source.state_dict().keys()
    source.load_state_dict(frozen.state_dict())  # and back


# --------------------------------------------------------------------------------- the moving average


def test_moving_average_follows_the_recurrence():
    """Parameters and batch-norm statistics against float64 arithmetic, the ramp and the bound included."""
    model = build_model("wrn-10-1", 3)
    average = ModelEMA(model, decay=0.4)
    expected = {key: value.double() for key, value in model.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for t in range(12):
        optimiser.zero_grad()
        F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 0])).backward()
        optimiser.step()
        average.update(model)
        decay = min(0.4, (1 + t) / (10 + t))  # the ramp reaches the bound at t = 5
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                expected[key] = decay * expected[key] + (1 - decay) * value.double()
            else:
                expected[key] = value.double()
    assert average.updates == 12
    assert expected["bn.num_batches_tracked"] == 12
    for key, value in average.network.state_dict().items():
        torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)
    assert not torch.equal(average.network.bn.running_mean, model.bn.running_mean)


def test_moving_average_is_bounded_by_its_decay():
    model = nn.Linear(1, 1, bias=False).double()
    average = ModelEMA(model, decay=0.25)
    value, w = model.weight.item(), 0.0
    for t in range(6):  # (1 + t) / (10 + t) reaches 0.25 at t = 2
        w += 1.0
        nn.init.constant_(model.weight, w)
        average.update(model)
        decay = [0.1, 2 / 11, 0.25, 0.25, 0.25, 0.25][t]
        value = decay * value + (1 - decay) * w
    assert average.network.weight.item() == pytest.approx(value, rel=1e-12)


def test_moving_average_is_apart_from_the_network():
    model = build_model("wrn-10-1", 3, dropout=0.5)
    average = ModelEMA(model, 0.9)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in average.network.modules())
    assert not any(p.requires_grad for p in average.network.parameters())
    before = copy.deepcopy(model.state_dict())
    nn.init.zeros_(average.network.conv1.weight)
    average.update(model)
    assert same_weights(model, before)
    with pytest.raises(ValueError, match="between 0 and 1"):
        ModelEMA(model, 1.5)


def test_moving_average_continues_exactly(tmp_path):
    def run(model, average, steps):
        generator = torch.Generator().manual_seed(steps[0])
        for _ in steps:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
                model(torch.randn(2, 3, 8, 8, generator=generator))
            average.update(model)

    model = build_model("wrn-10-1", 3)
    average = ModelEMA(model, 0.99)
    run(model, average, range(0, 3))
    saved = {"model": model.state_dict(), "average": average.network.state_dict(), "updates": average.updates}
    torch.save(saved, tmp_path / "state.pt")
    run(model, average, range(3, 6))

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = build_model("wrn-10-1", 3)
    resumed_average = ModelEMA(resumed, 0.99)
    resumed.load_state_dict(state["model"])
    resumed_average.network.load_state_dict(state["average"])
    resumed_average.updates.copy_(state["updates"])
    assert resumed_average.updates == 3
    run(resumed, resumed_average, range(3, 6))
    assert resumed_average.updates == 6
    assert same_weights(resumed_average.network, average.network.state_dict())


def test_a_depth_of_8n_plus_5_has_a_fourth_stage():
    """WRN-37-2: four blocks in each of four stages, of 32 to 256 channels, three of which halve."""
    model = build_model("wrn-37-2", 10, image_size=96)
    assert [block.conv2.out_channels for block in model.blocks] == [32] * 4 + [64] * 4 + [128] * 4 + [256] * 4
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 1 + 2 * 16
    with torch.no_grad():
        features = model.blocks(model.conv1(torch.zeros(1, 3, 96, 96)))
    assert features.shape == (1, 256, 12, 12)
    with pytest.raises(ValueError, match=r"8n \+ 5"):
        build_model("wrn-11-1", 10)


def test_views_at_test_time():
    """The mean probability over the image, its mirror image and, shifted by a pixel, both of them again."""
    network = build_model("wrn-10-1", 10, image_size=8).eval()
    images = torch.randn(4, 3, 8, 8)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    rolled = [images, padded[:, :, 2:, 2:], padded[:, :, :-2, :-2]]
    for views, moved in (("mirror", rolled[:1]), ("shift", rolled)):
        seen = [network(view).softmax(dim=1) for image in moved for view in (image, image.flip(3))]
        ours = SeveralViews(network, views)(images).softmax(dim=1)
        torch.testing.assert_close(ours, torch.stack(seen).mean(dim=0))


# ---------------------------------------------------------------------------------------------- FastCNN


def test_the_first_layer_of_fastcnn_whitens_patches():
    """The 12 numbers of a 2x2 patch become uncorrelated, of variance 1 where their variance is not small."""
    images = F.avg_pool2d(torch.randn(400, 3, 18, 18), 3, 1)  # neighbours are correlated
    network = build_model("fastcnn-8-8-8", 10, image_size=16)
    network.fit(images)
    outputs = network.whiten(images).detach().transpose(0, 1).flatten(1)
    assert torch.equal(outputs[12:], -outputs[:12])
    covariance = torch.cov(outputs[:12].double())
    variances = covariance.diagonal()
    torch.testing.assert_close(covariance, variances.diag(), atol=2e-3, rtol=0)
    patches = F.unfold(images.double(), 2).transpose(1, 2).flatten(0, 1)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(patches.T)).flip(0)
    torch.testing.assert_close(variances, eigenvalues / (eigenvalues + 5e-4), atol=2e-3, rtol=0)


def test_fastcnn_is_fitted_to_the_images_alone():
    """Not to the initial weights, and without the arbitrary signs of eigenvectors."""
    images = torch.randn(50, 3, 16, 16)
    weights = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = build_model("fastcnn-8-8-8", 10, image_size=16)
        network.fit(images)
        weights.append(network.whiten.weight)
    assert torch.equal(*weights) and not weights[0].requires_grad
    largest = weights[0][:12].flatten(1)
    assert (largest.gather(1, largest.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_convolutions_of_fastcnn_start_as_the_identity_of_their_first_inputs():
    first = build_model("fastcnn-32-16-8", 10).layers[0]
    x = torch.randn(2, 24, 9, 9)
    torch.testing.assert_close(first(x)[:, :24], x)
    assert first(x)[:, 24:].std() > 0.1
