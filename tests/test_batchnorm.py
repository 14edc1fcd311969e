"""Batch norms: folded away into their neighbours, on small nets that can fool an analysis and on families of models."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from transformers.pytorch_utils import Conv1D

import fresh
import normswap
from nets import WIDTH, ready, relative
from normswap.apply.live import apply_plan
from normswap.errors import RefusedError
from normswap.understand.normmap import find_sites
from normswap.verification.precision import LiftFloat32
from sweep import zoo
from sweep.disk import LOADER, prepare


def picture(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Seq(nn.Module):
    """Modules one after another, the input under the name `x`."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


IMAGE = (2, 6, 9, 8)


def folded(model, shape=IMAGE, sites=1, **request):
    """Fold the batch norms of a copy of `model`, and compare it with the original; the plan and the copy."""
    x = dict(x=picture(*shape))
    plan = normswap.plan(model, inputs=x, **(request or dict(fold=True)))
    converted = apply_plan(copy.deepcopy(model), plan)
    assert len(plan.converted) == sites
    with torch.no_grad():
        for inputs in (x, dict(x=picture(*shape, seed=1))):
            # measured: 1e-16 to 2e-15
            assert relative(converted(**inputs), model(**inputs)) < 1e-10
    assert plan.claim == "exact"
    return plan, converted


def refused(model, words, shape=IMAGE):
    with pytest.raises(RefusedError) as caught:
        normswap.plan(model, inputs=dict(x=picture(*shape)), fold=True)
    for word in words:
        assert word in str(caught.value), str(caught.value)


CONV = nn.Conv2d(6, WIDTH, 3, padding=1, bias=False)
WRITERS = {
    "padded convolution": (CONV, nn.BatchNorm2d, IMAGE),
    "with a bias": (nn.Conv2d(6, WIDTH, 3, stride=2), nn.BatchNorm2d, IMAGE),
    "depthwise": (nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH, bias=False), nn.BatchNorm2d, (2, WIDTH, 9, 8)),
    "grouped": (nn.Conv2d(6, WIDTH, 3, groups=3), nn.BatchNorm2d, IMAGE),
    "transposed": (nn.ConvTranspose2d(6, WIDTH, 3, bias=False), nn.BatchNorm2d, IMAGE),
    "transposed, square": (nn.ConvTranspose2d(WIDTH, WIDTH, 3), nn.BatchNorm2d, (2, WIDTH, 5, 4)),
    "1d": (nn.Conv1d(6, WIDTH, 3, bias=False), nn.BatchNorm1d, (2, 6, 9)),
    "3d": (nn.Conv3d(6, WIDTH, 2), nn.BatchNorm3d, (2, 6, 4, 3, 5)),
    "reflected at the border": (
        nn.Conv2d(6, WIDTH, 3, padding=1, padding_mode="reflect", bias=False),
        nn.BatchNorm2d,
        IMAGE,
    ),
    "linear": (nn.Linear(6, WIDTH, bias=False), nn.BatchNorm1d, (5, 6)),
    "linear of transformers": (Conv1D(WIDTH, 6), nn.BatchNorm1d, (5, 6)),
    "without gain and bias": (CONV, lambda n: nn.BatchNorm2d(n, affine=False), IMAGE),
}


@pytest.mark.parametrize("name", WRITERS)
def test_folded_into_what_writes_its_input(name):
    writer, norm, shape = WRITERS[name]
    model = ready(Seq(copy.deepcopy(writer), norm(WIDTH), nn.ReLU()))
    plan, converted = folded(model, shape)
    assert isinstance(converted.parts[1], nn.Identity)
    assert {name for name in converted.state_dict()} == {"parts.0.weight", "parts.0.bias"}
    if isinstance(writer, nn.modules.conv._ConvNd) and not isinstance(norm, type(lambda: 0)):
        transposed = isinstance(writer, nn.modules.conv._ConvTransposeNd)
        fused = fuse_conv_bn_eval(model.parts[0], model.parts[1], transpose=transposed)  # torch's own
        for name in ("weight", "bias"):
            assert relative(getattr(converted.parts[0], name), getattr(fused, name)) < 1e-12  # 1e-16 is measured


def test_folded_through_reshapes_and_into_a_linear_map_as_torch_does_it():
    class Flattened(nn.Module):
        """Tokens side by side, as LeViT has them: the norm reads all of them at once and only shapes stand between."""

        def __init__(self):
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(6, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x):
            y = self.up(x)
            y = self.norm(y.flatten(0, 1)).reshape_as(y)
            return self.down(F.hardswish(y))

    model = ready(Flattened())
    _, converted = folded(model, (2, 5, 6))
    fused = fuse_linear_bn_eval(model.up, model.norm)
    assert relative(converted.up.weight, fused.weight) < 1e-12 and relative(converted.up.bias, fused.bias) < 1e-12


def test_folded_into_what_reads_it_where_nothing_writes_it_alone():
    model = ready(Seq(nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, bias=False), nn.ReLU()))
    plan, converted = folded(model)
    assert {edit.edit for edit in plan.edits} >= {"fold_gain", "fold_bias", "grow_bias"}


def test_a_norm_on_each_side_of_one_convolution():
    """The bias that the reader grows for the first is scaled by the second."""
    model = ready(Seq(nn.Tanh(), nn.BatchNorm2d(6), nn.Conv2d(6, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH)))
    folded(model, sites=2)


def test_layer_norm_and_batch_norm_on_each_side_of_a_linear_map():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.linear, self.second = nn.LayerNorm(6), nn.Linear(6, WIDTH, False), nn.BatchNorm1d(WIDTH)

        def forward(self, x):
            return self.second(self.linear(self.first(x)))

    plan, converted = folded(ready(Both()), (5, 6), sites=2)
    assert [kind for kind, _ in ((s.kind, p) for p, s in find_sites(converted, dict(x=picture(5, 6))))] == ["layernorm"]


class Rep(nn.Module):
    """RepVGG: a norm beside convolutions of the same input."""

    def __init__(self, groups=1, kernel=3):
        super().__init__()
        self.alone = nn.BatchNorm2d(WIDTH)
        self.wide = nn.Conv2d(WIDTH, WIDTH, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.small = nn.Conv2d(WIDTH, WIDTH, 1, groups=groups)
        self.norms = nn.ModuleList([nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)])

    def forward(self, x):
        x = F.relu(x)
        y = self.norms[0](self.wide(x)) + self.alone(x)
        return F.relu(self.norms[1](self.small(x)) + y)


@pytest.mark.parametrize("how", [{}, dict(groups=WIDTH), dict(groups=3), dict(kernel=5)], ids=str)
def test_a_norm_beside_a_convolution_goes_into_its_kernel(how):
    plan, _ = folded(ready(Rep(**how)), (2, WIDTH, 6, 7), sites=3)
    assert sum(edit.edit == "carry_affine" for edit in plan.edits) == 2


def test_a_norm_that_is_subtracted_beside_a_convolution():
    class Minus(Rep):
        def forward(self, x):
            x = F.relu(x)
            return self.norms[0](self.wide(x)) - self.alone(x) + self.norms[1](self.small(x))

    plan, _ = folded(ready(Minus()), (2, WIDTH, 6, 7), sites=3)
    assert {edit.factor for edit in plan.edits if edit.edit == "carry_affine"} == {-1.0}


def test_one_norm_behind_several_convolutions():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

        def forward(self, x):
            return F.relu(self.norm(self.a(x))) * F.relu(self.norm(self.b(x)))

    folded(ready(Shared()))


def test_one_convolution_and_its_norm_at_several_scales():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.conv(x)).mean((2, 3)) + self.norm(self.conv(F.avg_pool2d(x, 2))).mean((2, 3))

    folded(ready(Pyramid()))


class Levels(nn.Module):
    """A convolution for all levels, and a norm for each (RetinaNet's and EfficientDet's heads)."""

    def __init__(self):
        super().__init__()
        self.conv, self.norms = nn.Conv2d(6, 8, 1), nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])

    def forward(self, x):
        return sum(F.relu(norm(self.conv(scale * x))) for scale, norm in enumerate(self.norms, 1))


class Seen(nn.Module):
    """What the norm reads is given out too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.conv(x)
        return F.relu(self.norm(y)), y


class Residual(Seen):
    def forward(self, x):
        y = self.conv(x)
        return y + F.relu(self.norm(y))


class Twice(Seen):
    """The norm has two names, and a conversion could exchange but one."""

    def __init__(self):
        super().__init__()
        self.also = self.norm

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


def shared_statistics():
    model = ready(Seq(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)))
    model.parts[4].weight = model.parts[1].weight
    return model


REFUSED = {
    "a padded reader hides a bias": (
        lambda: ready(Seq(nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1))),
        ["written by relu", "parts.2.weight is linear, but has no bias to take", "--norm affine"],
    ),
    "activations on both sides": (
        lambda: ready(Seq(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.BatchNorm2d(8), nn.GELU())),
        ["written by relu", "gelu in parts.3 reads it"],
    ),
    "several norms of one convolution": (lambda: ready(Levels()), ["conv.weight is used by conv2d in conv too"]),
    "read before the norm": (lambda: ready(Residual()), ["its input is read by add in the model as well"]),
    "an output of the model": (lambda: ready(Seen()), ["its input is an output of the model as well"]),
    "a module under two names": (lambda: ready(Twice()), ["also"]),
    "statistics of another": (shared_statistics, ["its weight is parts.4.weight as well"]),
    "pooled before it is normalised": (
        lambda: ready(Seq(nn.Conv2d(6, 8, 1), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU())),
        ["written by max_pool2d"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, words = REFUSED[name]
    refused(make(), words)


def test_a_norm_that_uses_its_batch_is_none_that_runs_on_statistics():
    model = ready(Seq(nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()))
    refused(model, ["no norm"])


@pytest.mark.parametrize("request_", [dict(fold=True), dict(norm="affine")], ids=str)
def test_a_norm_without_parameters_under_two_names_is_refused(request_):
    model = Twice()
    model.norm = model.also = nn.BatchNorm2d(8, affine=False)
    with pytest.raises(RefusedError, match="it is also as well|it is norm as well"):
        normswap.plan(ready(model), inputs=dict(x=picture(*IMAGE)), **request_)


TYPES = "resnet mobilenet_v2 regnet levit efficientnet detr wav2vec2-conformer parakeet_ctc sam3_lite_text_text_model"


def built(model_type):
    """A small random model in float64, and its inputs."""
    model = zoo.build(model_type).double()
    inputs = zoo.inputs_for(model)
    return model, {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}


@pytest.mark.parametrize("model_type", TYPES.split())
def test_families_fold_at_every_site(model_type):
    model, inputs = built(model_type)
    running = [path for path, spec in find_sites(model, inputs) if spec.kind == "batchnorm"]
    plan = normswap.plan(model, inputs=inputs, fold=True, partial=True)
    converted = apply_plan(copy.deepcopy(model), plan)
    assert running and not set(running) - set(plan.converted)
    left = [spec.kind for _, spec in find_sites(converted, inputs)]
    assert "batchnorm" not in left
    with torch.no_grad(), LiftFloat32():
        ours, theirs = (outputs(m(**inputs)) for m in (converted, model))
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        assert relative(ours[name], theirs[name]) < 1e-10, name  # measured: 1e-15 to 2e-13


def outputs(result):
    return {k: v for k, v in result.items() if torch.is_tensor(v) and v.is_floating_point() and v.numel() > 1}


def test_frozen_to_an_affine_map_where_nothing_can_take_it():
    """CLAP has a norm of mel bins, DETR norms of buffers alone, PatchTST norms of the stream."""
    checked = 0
    for model_type in ("clap_audio_model", "detr", "patchtst"):
        model, inputs = built(model_type)
        running = [path for path, spec in find_sites(model, inputs) if spec.kind == "batchnorm"]
        plan = normswap.plan(model, inputs=inputs, norm="affine")
        converted = apply_plan(copy.deepcopy(model), plan)
        assert plan.claim == "exact" and {*plan.converted} == {*running}
        with torch.no_grad(), LiftFloat32():
            ours, theirs = (outputs(m(**inputs)) for m in (converted, model))
        for name in ours:
            assert relative(ours[name], theirs[name]) < 1e-10  # measured: 1e-15 to 4e-15
            checked += 1
    assert checked > 2


def settled(parts):
    """A net whose running statistics are of data: pictures as `pictures` draws them, all of one distribution."""
    model = ready(parts).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the mean over batches
            norm.reset_running_stats()
    for seed in range(8):
        model(pictures(seed))
    return model.eval()


def pictures(seed, n=8):
    """Smooth pictures of one distribution."""
    coarse = torch.randn(n, 6, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.interpolate(coarse, size=(16, 16), mode="bilinear") + 0.3


def convolutions():
    layers = [(6, 32), (32, 32), (32, 48), (48, 48)]
    parts = [(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in layers]
    return Seq(*(part for three in parts for part in three), nn.Conv2d(48, 5, 1))


@pytest.mark.parametrize("kind", ["groupnorm", "layernorm"])
def test_norms_of_each_input_come_closer_than_copied_gains(kind):
    model = settled(convolutions())
    held_out = pictures(100, 16)
    batches = [dict(x=pictures(seed)) for seed in range(20, 24)]
    untrained = normswap.plan(model, norm=kind, inputs=batches[0])
    fitted = normswap.plan(model, norm=kind, inputs=batches[0], calibrate=batches)
    assert (untrained.claim, fitted.claim, fitted.calibrated_on) == ("untrained", "calibrated", "3 batches")

    def error(converted):
        with torch.no_grad():
            return float((converted(held_out) - model(held_out)).norm() / model(held_out).norm())

    without = apply_plan(copy.deepcopy(model), untrained)
    copied = copy.deepcopy(without)
    for path in untrained.converted:
        new, old = copied.get_submodule(path), model.get_submodule(path)
        new.weight.data.copy_(old.weight), new.bias.data.copy_(old.bias)
    errors = [error(apply_plan(copy.deepcopy(model), fitted)), error(without), error(copied)]
    # fitted, from running statistics, copied: 0.48, 0.47, 0.67 (groupnorm) and 0.79, 0.79, 0.92 (layernorm)
    assert max(errors[:2]) < 0.9 * errors[2]


def test_each_channel_keeps_the_moments_that_the_batch_norm_gave_it():
    model = settled(convolutions())
    batches = [dict(x=pictures(seed)) for seed in range(20, 24)]
    plan = normswap.plan(model, norm="groupnorm", inputs=batches[0], calibrate=batches)
    converted = apply_plan(copy.deepcopy(model), plan)
    checked = 0
    told = {norm.site: norm.error for norm in plan.fitted_norms}
    for path in plan.converted:
        ours, theirs = (seen(m, path, batches[:-1]) for m in (converted, model))
        error = (ours - theirs).square().mean().sqrt()
        spread = (theirs - theirs.mean((0, 2, 3), keepdim=True)).square().mean().sqrt()
        assert told[path] == pytest.approx(float(error / spread), rel=1e-5)  # statistics of whole maps
        for moment in (torch.mean, torch.std):
            assert relative(moment(ours, (0, 2, 3)), moment(theirs, (0, 2, 3))) < 1e-6  # 1e-7 is measured
            checked += 1
    assert checked == 8


def seen(model, path, batches):
    """What a module gives on all batches."""
    found = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat(found)


def test_random_inputs_spoil_no_running_statistics(tmp_path):
    """A folder of a model of pictures comes without any: its norms are made of what they remember of theirs."""
    model, inputs = built("resnet")
    model.save_pretrained(tmp_path / "source")
    done = normswap.convert(tmp_path / "source", tmp_path / "out", norm="groupnorm", verify="none")
    assert (done.plan.claim, done.plan.calibrated_on) == ("calibrated", "the running statistics of 29 norms")
    live = apply_plan(copy.deepcopy(model), normswap.plan(model, norm="groupnorm", inputs=inputs))
    loaded = normswap.load(tmp_path / "out").double()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in live.state_dict().items())


def test_on_disk_and_back(tmp_path):
    """Converted, loaded by transformers alone, and undone."""
    for model_type, request in (("resnet", dict(fold=True)), ("levit", dict(norm="affine"))):
        model = zoo.build(model_type)
        assert prepare(model, zoo.inputs_for(model), tmp_path / model_type, **request) is None
    normswap.undo(tmp_path / "resnet" / "converted", tmp_path / "back", verify="fast")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "resnet/source", tmp_path / "back")
    )
    assert before.keys() == after.keys()
    assert {k: t.dtype for k, t in before.items()} == {k: t.dtype for k, t in after.items()}
    assert {t.dtype for k, t in after.items() if k.endswith("num_batches_tracked")} == {torch.int64}
    assert max(float((before[k] - after[k]).abs().max()) for k in before) < 1e-14  # 6e-17 is measured
    found = fresh.run(LOADER.read_text("utf-8"), tmp_path / "resnet", tmp_path / "levit").splitlines()
    assert len(found) == 2
    assert all(json.loads(said)["error"] < 1e-10 for said in found), found  # 2e-15 is measured
