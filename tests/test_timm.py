"""Networks of timm, where it is installed: built, found, frozen, with weights as its hub holds them."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_models import on_meta, randomise_norms, same_weights
from torch import nn

import main
from augmentation import Views
from engine.norms import SyncBatchNorm, with_norms
from engine.runtime import Runtime
from methods import METHODS
from models import build_model, disable_dropout, head_of
from run import arguments
from utils import UserError

timm = pytest.importorskip("timm")
from safetensors.torch import save_file  # noqa: E402 (comes with timm)

KINDS = [  # the smallest of each kind; image size, name of the classifier, features
    ("timm/resnet18", 32, "fc", 512),
    ("timm/resnet50", 32, "fc", 2048),
    ("timm/efficientnet_b0", 32, "classifier", 1280),
    ("timm/mobilenetv3_small_050", 32, "classifier", 1024),
    ("timm/convnext_atto", 32, "head.fc", 320),
    ("timm/convnext_tiny.fb_in1k", 32, "head.fc", 768),
    ("timm/vit_tiny_patch16_224", 32, "head", 192),
    ("timm/vit_small_patch14_dinov2", 28, "head", 384),
    ("timm/swin_tiny_patch4_window7_224", 32, "head.fc", 768),
]


@pytest.mark.parametrize(("name", "size", "head", "features"), KINDS)
def test_the_head_is_found_and_of_so_many_classes(name, size, head, features):
    model = on_meta(name, 7, image_size=size, bn_momentum=0.3, bn_eps=0.5)
    assert head_of(model) is model.get_submodule(head)
    assert head_of(model).weight.shape == (7, features)
    assert model.eval()(torch.empty(2, 3, size, size, device="meta")).shape == (2, 7)
    norms = {(m.momentum, m.eps) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    assert norms == ({(0.3, 0.5)} if "net_b0" in name or "resnet" in name or "mobile" in name else set())
    assert not any(getattr(module, "inplace", False) for module in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "test_vit"])
def test_dropout_stands_before_the_classifier_until_it_is_disabled(name):
    model, images = build_model(f"timm/{name}", 3, dropout=0.75), torch.randn(4, 3, 32, 32)
    read = []
    head_of(model).register_forward_pre_hook(lambda _, inputs: read.append((inputs[0] == 0).float().mean()))
    with torch.no_grad():
        model.train()(images)
        model.eval()(images)
        disable_dropout(model)
        model.train()(images)
    dropped, evaluated, disabled = read
    assert abs(dropped - (evaluated + 0.75 * (1 - evaluated))) < 0.1 > abs(disabled - evaluated)


def test_stochastic_depth():
    rates = [
        m.drop_prob
        for m in build_model("timm/convnext_atto", 3, stochastic_depth=0.4).modules()
        if hasattr(m, "drop_prob")
    ]
    assert max(rates) == rates[-1] == pytest.approx(0.4) and rates == sorted(rates)
    with pytest.raises(ValueError, match="timm/vgg11 has no stochastic depth"):
        on_meta("timm/vgg11", 3, stochastic_depth=0.4)


@pytest.mark.parametrize(
    ("name", "size"), [("mobilenetv3_small_050", 32), ("efficientnet_b0", 32), ("test_vit", 32)]
)
def test_a_frozen_body_computes_as_in_evaluation_and_only_its_head_learns(name, size, tmp_path):
    """timm's batch norms contain the activation behind them."""
    source = build_model(f"timm/{name}", 4, image_size=size)
    randomise_norms(source)
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    options = {"image_size": size, "weights": tmp_path / "weights.pt", "freeze_body": True}
    frozen = build_model(f"timm/{name}", 4, **options).train()
    assert {id(p) for p in frozen.parameters() if p.requires_grad} == {
        id(p) for p in head_of(frozen).parameters()
    }
    images = torch.randn(3, 3, size, size)
    disable_dropout(frozen)
    torch.testing.assert_close(frozen(images), source.eval()(images), rtol=1e-4, atol=1e-5)
    assert same_weights(frozen, source.state_dict())  # running statistics, too


def test_synchronised_statistics_keep_the_activation(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build_model("timm/mobilenetv3_small_050", 4).double()
        randomise_norms(model)
        other = with_norms(copy.deepcopy(model), SyncBatchNorm)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in other.modules())
        images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
        for mode in (True, False):
            torch.testing.assert_close(other.train(mode)(images), model.train(mode)(images))
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub's client, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def publish(hub, name, **options):
    """timm's network with other weights, whose file lies where a downloaded one would."""
    source = timm.create_model(name, **options)
    folder = hub / f"models--timm--{name}.{source.pretrained_cfg['tag']}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc").mkdir(parents=True)
    save_file(source.state_dict(), folder / "snapshots/abc/model.safetensors")
    return source.state_dict(), folder / "snapshots/abc/model.safetensors"


def test_pretrained_reads_the_hubs_file_and_leaves_another_head_out(hub):
    state, file = publish(hub, "test_convnext")
    head = ("head.fc.weight", "head.fc.bias")
    model = build_model("timm/test_convnext", 5, pretrained=True)
    assert same_weights(model, state, but=head) and head_of(model).weight.shape[0] == 5
    assert same_weights(build_model("timm/test_convnext", 1000, pretrained=True), state)
    assert same_weights(build_model("timm/test_convnext", 5, weights=file), state, but=head)
    assert same_weights(build_model("timm/test_convnext", 1000, weights=file), state)


def test_position_embeddings_are_resized_and_a_file_may_lack_a_head(hub):
    """DINOv2's files have none."""
    state, file = publish(hub, "test_vit", num_classes=0)
    assert "head.weight" not in state
    own = ("pos_embed", "head.weight", "head.bias")
    from_file = build_model("timm/test_vit", 5, image_size=64, weights=file)
    assert state["pos_embed"].shape[1] == 1 + 100 and from_file.pos_embed.shape[1] == 1 + 16
    assert same_weights(from_file, state, but=own)
    published = build_model("timm/test_vit", 5, image_size=64, pretrained=True)
    assert same_weights(published, from_file.state_dict(), but=own[1:])


def test_weights_of_this_project_and_of_other_networks(tmp_path):
    file = tmp_path / "checkpoint.pt"
    source = build_model("timm/test_vit", 3)
    torch.save({"avg_state_dict": source.state_dict()}, file)
    assert same_weights(build_model("timm/test_vit", 3, weights=file), source.state_dict())
    with pytest.raises(ValueError, match=r"does not fit this network: it lacks .*Give --model"):
        build_model("timm/test_resnet", 3, weights=file)
    with pytest.raises(ValueError, match=r"does not fit this network \(.*\)\. Give --model"):
        build_model("timm/test_convnext", 3, weights=file)  # whose file timm would convert


def test_what_cannot_be_had_is_said_in_one_sentence(hub):
    url = r"https://huggingface\.co/timm/resnet18\.a1_in1k/resolve/main/model\.safetensors"
    for name, words in [
        ("timm/resnet18", rf"cannot be downloaded \(.*\): fetch {url} .*--weights FILE.*--no-pretrained"),
        ("timm/resnet14", r"has no network 'resnet14'.*list_models"),
        ("timm/hf-hub:timm/resnet18", r"has no network"),
        ("timm/resnet18.magic", r"Invalid pretrained tag \(magic\)"),
        ("timm/lcnet_035", r"no published weights"),
        ("timm/deit_tiny_distilled_patch16_224", r"two classifiers"),
        ("timm/xcit_nano_12_p8_224", r"30 pixels.*--resize"),
        ("timm/maxvit_pico_rw_256", r"30 pixels.*--resize"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            build_model(name, 3, image_size=30, pretrained=True)
        assert "\n" not in str(error.value)


def expected(*flags):
    args = main.parse_arguments(["--dataset", "folder", *flags])
    return arguments.expected_statistics(args)


def test_images_are_normalised_as_timm_says(tmp_path):
    half, imagenet = ((0.5,) * 3,) * 2, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.save({}, tmp_path / "weights.pt")
    vit, resnet = ("--model", "timm/vit_tiny_patch16_224"), ("--student-model", "timm/resnet18")
    assert expected(*vit) is None
    assert expected(*vit, "--pretrained") == half == expected(*vit, "--weights", str(tmp_path / "weights.pt"))
    assert expected("--model", "timm/vit_small_patch14_dinov2", *resnet, "--pretrained") == imagenet
    assert expected("--model", "resnet18", *resnet, "--pretrained") == imagenet
    assert expected(*vit, *resnet, "--pretrained", "--normalize", "imagenet") == imagenet
    with pytest.raises(
        UserError, match=r"resnet18 and timm/vit_tiny.* differently normalised images: give --normalize"
    ):
        expected(*vit, *resnet, "--pretrained")
    fixed = ("--method", "pseudo-label", "--teacher-checkpoint", "x", "--student-model")
    assert expected(*fixed, "timm/vit_tiny_patch16_224", "--pretrained") == half  # no other network is built
    with pytest.raises(UserError, match=r"has no network"):
        expected("--model", "timm/nothing", "--pretrained")


# ------------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("feedback", ["taylor", "dot", "exact"])
def test_a_vision_transformer_learns_with_every_feedback(feedback):
    words = f"--dataset digits --resize 32 --model timm/test_vit --feedback {feedback} --total-steps 9"
    args = main.parse_arguments([*words.split(), "--student-dropout", "0.2", "--body-lr-scale", "0.1"])
    method = METHODS["mpl"](args, 3, 32, Runtime("cpu"))
    before = {role: copy.deepcopy(each.network.state_dict()) for role, each in method.learners.items()}
    labeled, weak, strong = (torch.randn(n, 3, 32, 32) for n in (4, 8, 8))
    views = Views(labeled, torch.arange(4) % 3, weak, strong)
    values = [method.step(views, step)["feedback"].item() for step in range(2)]
    assert all(value != 0 and math.isfinite(value) for value in values)
    assert method.student.forward_mode == (feedback != "exact")
    for role, learner in method.learners.items():
        changed = [
            not torch.equal(value, before[role][key]) for key, value in learner.network.state_dict().items()
        ]
        assert all(changed)


def test_a_run_from_published_weights_is_evaluated_without_them(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publish(hub, "test_convnext")
    words = "--dataset digits --resize 32 --num-labeled 10 --model timm/test_convnext --pretrained --name run"
    words += " --feedback exact --pseudo-label soft --batch-size 4 --mu 2 --total-steps 2 --eval-step 2"
    words += " --body-lr-scale 0.1 --finetune-epochs 1 --device cpu --workers 0"
    assert main.run(words.split()) == 0
    state = torch.load("checkpoint/run_last.pth.tar", weights_only=True)
    assert state["data"]["mean"] == [0.5, 0.5, 0.5]
    assert [group["scale"] for group in state["student_optimizer"]["param_groups"]] == [1, 1, 0.1, 0.1]
    shutil.rmtree(hub)
    assert main.run(["--evaluate", "--resume", "checkpoint/run_last.pth.tar"]) == 0
    first, second = (
        json.loads(Path(f"results/{name}/summary.json").read_text()) for name in ("run", "run_last")
    )
    assert first["top1"] == second["top1"]
