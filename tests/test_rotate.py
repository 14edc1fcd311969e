"""Streams carried in another basis: the same function on models of many families, and refusals where it cannot be."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import fresh
import normswap
from models import tiny
from nets import VOCAB, WIDTH, Block, Net, ids, ready
from normswap.apply.live import apply_plan
from normswap.errors import PlanError, RefusedError
from normswap.planning.edits import Rotate
from normswap.planning.orthogonal import Rotation, hadamard_factors
from normswap.planning.plans import Plan
from normswap.verification.live import measure_live
from sweep import zoo

# measured: at most 3e-15 at every norm (turned back) and output
EXACT = 1e-12


def rotated(model, inputs=None, by="hadamard", **words):
    """The plan, and what it measures in float64 at every norm and every output."""
    plan = normswap.plan(model, rotate=by, inputs=inputs, **words)
    assert plan.claim == "exact" and plan.rotated
    return plan, measure_live(model, plan, [zoo.inputs_for(model) if inputs is None else inputs])


# -- matrices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "largest"),
    [(64, 1), (12, 1), (28, 1), (36, 1), (160, 1), (180, 1), (768, 1), (7, 2**0.5), (52, 2**0.5)],
)
def test_hadamard_is_orthogonal_and_flat_where_a_paley_matrix_is_known(width, largest):
    rotation, one = Rotation(by="hadamard", width=width, seed=3), torch.eye(width, dtype=torch.float64)
    matrix = rotation.turn(one, 0, None)
    assert (matrix @ matrix.T - one).abs().max() < 1e-13  # measured: 2e-14
    assert matrix.abs().max() * width**0.5 == pytest.approx(largest, abs=1e-9)
    x = torch.randn(5, width, dtype=torch.float64)
    torch.testing.assert_close(rotation.turn(x, 1, None), x @ matrix.T, rtol=0, atol=1e-13)
    assert sum(map(len, hadamard_factors(4096))) == 128  # a product takes 128 steps per value, not 4096


@pytest.mark.parametrize("by", ["hadamard", "random", "reflected", "fitted"])
def test_runs_of_channels_are_turned_one_by_one_and_back(by):
    generator = torch.Generator().manual_seed(0)
    fitted = torch.randn(6, generator=generator, dtype=torch.float64)
    if by == "fitted":
        fitted = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    rotation = Rotation(by=by, width=6, fitted="x")
    x = torch.randn(3, 18, 2, generator=generator, dtype=torch.float64)
    turned = rotation.turn(x, 1, lambda name: fitted)
    torch.testing.assert_close(turned[:, 6:12], rotation.turn(x[:, 6:12], -2, lambda name: fitted), rtol=0, atol=0)
    assert (turned - x).abs().max() > 0.1
    torch.testing.assert_close(rotation.turn(turned, 1, lambda name: fitted, back=True), x, rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="runs of 6 values, found 20"):
        rotation.turn(torch.zeros(3, 20), 1, lambda name: fitted)


# -- families ----------------------------------------------------------------------------------------------------------

# type -> (streams that are rotated, norms on them, what else is asked for)
FAMILIES = {
    "llama": (1, 5, {}),
    "gemma": (1, 5, dict(tied="untie")),  # gain 1 + w, embeddings multiplied by a constant
    "mixtral": (1, 5, {}),  # experts as 3-D weights, a router
    "qwen3": (1, 5, {}),  # norms of queries and keys stay as they are
    "deepseek_v3": (1, 5, {}),  # latent attention with norms of its own
    "mamba": (1, 3, dict(tied="untie")),
    "t5": (2, 12, dict(tied="untie")),  # an encoder and a decoder that reads it
    "llava": (1, 5, {}),  # what the image tower writes is rotated in its projection
    "gpt_neox": (1, 5, dict(norm="rmsnorm")),  # parallel, two norms
    "gpt2": (1, 5, dict(norm="rmsnorm", tied="untie")),  # weights the other way round
    "cohere": (1, 3, dict(norm="rmsnorm", tied="untie")),  # parallel, one norm
}


@pytest.mark.parametrize(("name", "by"), [*((name, "hadamard") for name in FAMILIES), ("mixtral", "random")])
def test_the_function_is_the_same(name, by):
    streams, norms, words = FAMILIES[name]
    model = zoo.build(name)
    plan, measured = rotated(model, by=by, partial=name == "llava", **words)
    assert len(plan.rotated) == streams and sum(len(stream.sites) for stream in plan.rotated) == norms
    assert measured.dtype == "float64" and measured.worst_error < EXACT
    compared = [site.site for site in measured.sites if site.says_something]
    assert {path for stream in plan.rotated for path in stream.sites} <= set(compared)


def test_every_weight_that_is_rotated_has_to_be():
    model = tiny("llama").double()
    inputs = {"input_ids": torch.arange(12).reshape(2, 6)}
    plan, _ = rotated(model, inputs)
    edits = [edit for edit in plan.edits if isinstance(edit, Rotate)]
    assert len(edits) == 2 + 2 * 7
    before = model(**inputs).logits
    for left_out in edits:
        wrong = plan.model_copy(update={"edits": tuple(edit for edit in plan.edits if edit is not left_out)})
        after = apply_plan(copy.deepcopy(model), wrong)(**inputs).logits
        assert (after - before).abs().max() > 1e-3 * before.abs().max(), left_out.tensor


def test_streams_are_rotated_each_by_its_own_and_inner_values_given_out_are_named():
    plan, measured = rotated(zoo.build("t5"), tied="untie")
    encoder, decoder = plan.rotated
    assert encoder.rotation.seed != decoder.rotation.seed
    by = {edit.tensor: edit.rotation for edit in plan.edits if isinstance(edit, Rotate)}
    # what reads the encoder in the decoder is turned as the encoder is
    assert by["decoder.block.0.layer.1.EncDecAttention.k.weight"] == encoder.rotation
    assert by["decoder.block.0.layer.1.EncDecAttention.q.weight"] == decoder.rotation
    assert plan.rotated[0].outputs == ("encoder_last_hidden_state",)
    assert any("encoder_last_hidden_state" in reason for reason in plan.reasons)
    assert "encoder_last_hidden_state" not in [other.name for other in measured.others]


def test_principal_axes_come_in_order():
    model = tiny("llama").double()
    batches = [{"input_ids": torch.randint(3, 99, (4, 16), generator=torch.Generator().manual_seed(s))} for s in (1, 2)]
    plan = normswap.plan(model, rotate="pca", calibrate=batches)
    assert plan.claim == "exact" and plan.calibrated_on == "1 batches"
    after = apply_plan(copy.deepcopy(model), plan)
    assert measure_live(model, plan, batches).worst_error < EXACT
    seen = []
    for path in plan.rotated[0].sites:  # with neutral gains, what each norm gives is what counts
        after.get_submodule(path).register_forward_hook(lambda m, i, y: seen.append(y.flatten(0, 1)))
    after(**batches[0])
    moment = sum(n.T @ n / len(n) for n in seen)
    off = moment - moment.diagonal().diag()
    assert off.abs().max() < 1e-6 * moment.abs().max()  # measured: 2e-8, as Llama's norms compute in float32
    assert (moment.diagonal().diff() < 0).all()


def test_a_plan_that_waits_for_data_changes_nothing():
    model = tiny("llama")
    plan, before = normswap.plan(model, rotate="pca"), copy.deepcopy(model.state_dict())
    assert plan.lacks() == ["rotation.0"]
    with pytest.raises(PlanError, match=r"lacks 1 fitted tensors, rotation\.0.*--calibrate"):
        apply_plan(model, plan)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_a_gain_between_a_branch_and_the_stream_keeps_it(name):
    with pytest.raises(RefusedError, match=r"the gain of .* acts on single channels and stays: .*no weight"):
        normswap.plan(tiny(name), rotate="hadamard", tied="untie")


class Rms(nn.Module):
    def __init__(self, width=WIDTH, gain=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if gain else None

    def forward(self, x):
        n = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return n if self.weight is None else self.weight * n


def net(between=None, block=None):
    model = Net(block or (lambda: Block(norm=Rms())), Rms)
    model.extra = Block()
    if between is not None:
        model.between = between.__get__(model)
    return ready(model)


def gelu(self, x, mask):
    return x + F.gelu(x)


def waves(self, x, mask):
    return x + torch.arange(WIDTH, dtype=x.dtype).sin()


def scaled(self, x, mask):
    return x * self.head.weight[0]


def swapped(self, x, mask):
    return x.flip(-1)


def normed(self, x, mask):
    return F.layer_norm(x, (WIDTH,))


@pytest.mark.parametrize("between", [gelu, waves, scaled, swapped, normed])
def test_what_acts_on_single_channels_keeps_the_stream(between):
    with pytest.raises(RefusedError, match="its stream cannot be rotated"):
        normswap.plan(net(between), rotate="random", inputs={"ids": ids(2, 5)})


def halved(self, x, mask):
    return 0.5 * x


def read(self, x, mask):
    """Linear maps of the raw stream, and its length, which no rotation changes."""
    return x + self.extra.down(F.gelu(self.extra.up(x))) * x.norm(dim=-1, keepdim=True)


def shared(self, x, mask):
    """What reads the second block's norm reads the raw stream too."""
    return x + self.extra.down(F.gelu(self.second.up(x)))


class Closed(Block):
    """A norm without gain on the branch commutes with any rotation."""

    def __init__(self):
        super().__init__(norm=Rms())
        self.close = Rms(gain=False)

    def branch(self, x):
        return self.close(super().branch(x))


@pytest.mark.parametrize(
    ("model", "weights"),
    [(net(halved), 8), (net(block=Closed), 8), (net(read), 8 + 3)],
    ids=["a constant", "a branch norm without gain", "what reads the stream itself"],
)
def test_what_a_rotation_passes_through(model, weights):
    plan, measured = rotated(model, {"ids": ids(2, 5)}, by="random")
    assert measured.worst_error < EXACT
    # the embedding, what reads and writes in each block with the bias of that, and the head
    assert sum(isinstance(edit, Rotate) for edit in plan.edits) == weights


def test_a_weight_that_reads_the_raw_stream_too_keeps_the_gain_and_so_the_stream():
    with pytest.raises(RefusedError, match=r"second\.up\.weight in second\.up reads other values too"):
        normswap.plan(net(shared), rotate="random", inputs={"ids": ids(2, 5)})


def test_layernorms_stay_unless_they_are_converted():
    with pytest.raises(RefusedError, match="has no stream of RMSNorms to rotate"):
        normswap.plan(tiny("gpt_neox"), rotate="random")
    with pytest.raises(RefusedError, match=r"its mean is subtracted at run time in .*--tied untie"):
        normswap.plan(tiny("gpt2"), norm="rmsnorm", rotate="random")


# -- on disk -----------------------------------------------------------------------------------------------------------

LOAD = """
import sys
sys.modules["normswap"] = None
import torch
from transformers import AutoModelForCausalLM
with torch.no_grad():
    a, b = (AutoModelForCausalLM.from_pretrained(folder)(torch.arange(40)[None]).logits for folder in sys.argv[1:])
print(float((a - b).abs().max() / a.abs().max()))
"""


def test_the_stock_class_loads_a_rotated_folder(tmp_path, checkpoints):
    source, out = checkpoints / "llama-shakespeare", tmp_path / "out"
    conversion = normswap.convert(source, out, rotate="hadamard", verify="fast")
    assert conversion.report.mathematics.comparison.worst_error < EXACT  # measured: 4e-15
    assert not list(out.glob("*.py"))
    assert float(fresh.run(LOAD, source, out)) < 1e-4  # measured: 4e-6, in float32
    norm = AutoModelForCausalLM.from_pretrained(out).model.norm.weight
    assert torch.equal(norm, torch.ones_like(norm))
    with pytest.raises(RefusedError, match="not converted twice"):
        normswap.plan(out, rotate="hadamard")


@pytest.mark.parametrize(
    ("name", "words"),
    [("gpt2-shakespeare", dict(norm="rmsnorm", tied="untie")), ("gpt_neox-shakespeare", dict(norm="rmsnorm"))],
)
def test_trained_checkpoints_centred_and_rotated(tmp_path, checkpoints, name, words):
    conversion = normswap.convert(checkpoints / name, tmp_path / "out", rotate="hadamard", verify="fast", **words)
    measured = conversion.report.mathematics.comparison
    assert conversion.plan.claim == "exact" and measured.worst_error < EXACT  # measured: 3e-15
    assert len(conversion.plan.rotated[0].sites) == 13 == len(measured.sites)


def test_a_plan_with_a_fitted_matrix_comes_back(tmp_path):
    model = tiny("llama").double()
    batches = [{"input_ids": torch.randint(3, VOCAB, (2, 8))}] * 2
    plan = normswap.plan(model, rotate="pca", calibrate=batches)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again.lacks() == []
    a, b = (apply_plan(copy.deepcopy(model), made).state_dict() for made in (plan, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(PlanError, match="cannot read"):
        Plan.load(tmp_path / "plan.json")
