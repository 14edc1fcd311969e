"""DeepNorm to post-norm exactly: the scale of a skip goes into what writes the branches, and from the source."""

import copy
import inspect
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import MiniMaxConfig, MiniMaxForCausalLM

import fresh
import normswap
from models import tiny
from nets import WIDTH, Net, check_refused, ids, ready, relative
from normswap.apply.live import apply_plan
from normswap.planning.edits import Scale, SwapNorm
from normswap.planning.planner import plan_moves
from normswap.planning.request import Request
from normswap.planning.rewrites.moved import Scales
from normswap.understand.normmap import NormMap
from normswap.verification.precision import LiftFloat32
from sweep.zoo import randomise

INPUTS = dict(ids=ids(3, 6))
ALPHA = 1.75


class Deep(nn.Module):
    """`norm(alpha * x + down(gelu(up(x))))`"""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.norm = norm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 18), nn.Linear(18, WIDTH)
        self.alpha = ALPHA

    def branch(self, x):
        return self.down(F.gelu(self.up(x)))

    def forward(self, x):
        return self.norm(self.alpha * x + self.branch(x))


class DeepNet(Net):
    def __init__(self, block=Deep):
        super().__init__(block)
        del self.last

    def forward(self, ids, mask=None):
        return self.head(self.second(self.first(self.embed(ids))))


def net(block) -> Net:
    return ready(DeepNet(block))


class WrittenOut(Deep):
    def forward(self, x):
        return self.norm(x * 0.4 + self.branch(x))


class OfTheModule(Deep):
    def forward(self, x):
        residual = ALPHA * x
        return self.norm(self.branch(x) + residual)


class Divided(Deep):
    def forward(self, x):
        y = self.branch(x)
        return self.norm(x / self.alpha + y)


class Twice(Deep):
    def forward(self, x):
        return self.norm((x * self.alpha) * (2 * self.alpha) + self.branch(x))


class Rms(Deep):
    def __init__(self):
        super().__init__(lambda width: nn.RMSNorm(width, eps=0.1))


class BranchNorm(Deep):
    def __init__(self):
        super().__init__()
        self.inner = nn.LayerNorm(WIDTH)

    def branch(self, x):
        return self.inner(super().branch(x))


class Parallel(Deep):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.norm(self.alpha * x + self.branch(x) + 0.3 * self.other(x))


AND_POST = "branch and post"
NAMES = {BranchNorm: AND_POST, Parallel: "deepnorm, parallel"}
#: block -> the scale of its skip
BLOCKS = {
    Deep: ALPHA,
    WrittenOut: 0.4,
    OfTheModule: ALPHA,
    Divided: 1 / ALPHA,
    Twice: 2 * ALPHA**2,
    Rms: ALPHA,
    BranchNorm: ALPHA,
    Parallel: ALPHA,
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_a_block_written_by_hand(block):
    model, a = net(block), BLOCKS[block]
    plan = normswap.plan(model, placement="post", exact=True, inputs=INPUTS)
    assert plan.claim == "exact" and plan.converted == ("first.norm", "second.norm")
    assert [(b.before, b.after) for b in plan.moved] == [(NAMES.get(block, "deepnorm"), "post")] * 2
    moved = apply_plan(copy.deepcopy(model), plan)
    found, expected = moved(**INPUTS), model(**INPUTS)
    assert relative(found.detach(), expected.detach()) < 1e-12  # measured: up to 3e-15
    # the inputs' gradients, and those of all that stayed; of what was divided, a times as large
    factors = {edit.tensor: 1 / edit.factor for edit in plan.edits if isinstance(edit, Scale)}
    assert factors and all(math.isclose(factor, a) for factor in factors.values())
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0), dtype=found.dtype)
    names = [name for name, _ in model.named_parameters()]
    mine, theirs = (
        dict(zip(names, torch.autograd.grad((weights * y).sum(), [m.get_parameter(n) for n in names]), strict=True))
        for y, m in ((found, moved), (expected, model))
    )
    for name in names:
        assert relative(mine[name], factors.get(name, 1.0) * theirs[name]) < 1e-10, name  # measured: up to 3e-13
    # what is there now: the table's post-norm block, with the divided weights and the divided eps
    stream = NormMap.of(moved, INPUTS).streams[0]
    assert [b.placement.split(",")[0] for b in stream.blocks][-1] == ("post" if block is not BranchNorm else AND_POST)
    assert not any(b.is_scaled for b in stream.blocks)
    eps = [edit.eps for edit in plan.edits if isinstance(edit, SwapNorm)]
    assert eps == pytest.approx([getattr(model.first.norm, "eps", None) / a**2] * 2, rel=1e-9)


def test_the_source_says_what_was_changed():
    model = net(OfTheModule)
    moved = apply_plan(model, normswap.plan(model, placement="post", inputs=INPUTS))
    text = inspect.getsource(type(moved.first).forward)
    assert "        residual = x  # changed\n        return self.norm(self.branch(x) + residual)\n" in text
    model = net(Twice)
    moved = apply_plan(model, normswap.plan(model, placement="post", inputs=INPUTS))
    assert "return self.norm(x + self.branch(x))  # changed" in inspect.getsource(type(moved.first).forward)


# -- models of transformers --------------------------------------------------------------------------------------------


def deepnorm() -> nn.Module:
    """A GPT-2 with DeepNorm blocks, each with a scale of its own."""
    model = tiny("gpt2").double()
    constants = {f"transformer.h[{i}]": 0.7 + 0.13 * i for i in range(4)}
    plan, _ = plan_moves(NormMap.of(model, TOKENS), Request.of(placement="deepnorm"), scales=Scales(stream=constants))
    return apply_plan(model, plan)


TOKENS = {"input_ids": torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(0))}


def logits(model: nn.Module) -> torch.Tensor:
    with LiftFloat32(), torch.no_grad():
        return model(**TOKENS).logits


def test_some_layers():
    model = deepnorm()
    moved = copy.deepcopy(model)
    plan = normswap.convert_model(moved, placement="post", layers="1")
    assert plan.claim == "exact" and [block.layer for block in plan.moved] == [1, 1]
    assert type(moved.transformer.h[0]) is type(model.transformer.h[0])
    assert relative(logits(moved), logits(model)) < 1e-12  # 2e-15
    # and back to another scale: the module's old number is not in the way
    normswap.convert_model(moved, placement="deepnorm", layers="1")
    assert relative(logits(moved), logits(model)) < 1e-12  # 2e-15


# -- a type of transformers that is trained so: MiniMax ----------------------------------------------------------------


def minimax() -> nn.Module:
    config = MiniMaxConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=40,
        num_local_experts=3,
        layer_types=["full_attention", "linear_attention"],
        block_size=4,
        full_attn_alpha_factor=2.5,
        full_attn_beta_factor=0.7,
        linear_attn_alpha_factor=1.5,
        mlp_alpha_factor=3.0,
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    return randomise(MiniMaxForCausalLM._from_config(config, attn_implementation="eager"), 0).eval()


def test_minimax_in_a_folder_opened_without_normswap(tmp_path):
    model = minimax()
    model.save_pretrained(tmp_path / "source")
    done = normswap.convert(tmp_path / "source", tmp_path / "out", placement="post", exact=True, verify="fast")
    assert done.plan.claim == "exact" and len(done.plan.moved) == 4
    assert done.report.mathematics.comparison.output.error.max < 1e-12  # measured: 2e-15
    text = (tmp_path / "out" / "modeling_normswap.py").read_text()
    assert "hidden_states = residual + hidden_states * self.attn_beta_factor  # changed" in text
    assert logits_without_normswap(tmp_path / "out", tmp_path) < 1e-5  # float32; measured: 1e-6


SCRIPT = """
import sys
sys.modules["normswap"] = None
import torch
from transformers import AutoModelForCausalLM

ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
load = dict(attn_implementation="eager", trust_remote_code=True)
with torch.no_grad():
    a, b = (AutoModelForCausalLM.from_pretrained(folder, **load)(ids).logits for folder in ("source", sys.argv[1]))
print(float((a - b).abs().max() / a.std()))
"""


def logits_without_normswap(folder: Path, root: Path) -> float:
    """How far the logits of a folder are from those of the folder `source` in `root`, in a process of its own."""
    return float(fresh.run(SCRIPT, folder, cwd=root))


# -- refused -----------------------------------------------------------------------------------------------------------


class AParameter(Deep):
    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(1.5))


class ABuffer(Deep):
    def __init__(self):
        super().__init__()
        del self.alpha
        self.register_buffer("alpha", torch.tensor(1.5))


class PerChannel(Deep):
    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(WIDTH))


class Negative(Deep):
    def __init__(self):
        super().__init__()
        self.alpha = -1.5


class InTheSum(Deep):
    def forward(self, x):
        return self.norm(torch.add(self.branch(x), x, alpha=2))


class Local(Deep):
    def forward(self, x):
        a = 2.0 if len(x) else 3.0
        return self.norm(a * x + self.branch(x))


class Counting(Deep):
    def forward(self, x):
        self.alpha = self.alpha + 0.0
        return self.norm(self.alpha * x + self.branch(x))


class Called(Deep):
    def forward(self, x):
        return self.norm(math.sqrt(3) * x + self.branch(x))


class NotLinear(Deep):
    def branch(self, x):
        return torch.tanh(super().branch(x))


class SharedEnd(DeepNet):
    def __init__(self):
        super().__init__(Deep)
        self.second.down = self.first.down
        self.second.alpha = 3.0


REFUSED = {
    AParameter: ["its skip is scaled by first.alpha", "takes a number that the code has, not a tensor"],
    ABuffer: ["its skip is scaled by first.alpha"],
    PerChannel: ["its skip is scaled by first.alpha"],
    Negative: ["its skip is scaled by -1.5, and a norm sees the sign"],
    InTheSum: ["its skip has a factor (2) that is no product `a * x` of the skip alone"],
    Local: ["expected a product with one number, written out or held by the module", "a * x"],
    Counting: ["expected a product with one number", "self.alpha * x"],
    Called: ["expected a product with one number", "math.sqrt(3) * x"],
    NotLinear: ["what ends its branch is not known; expected linear maps or a norm"],
}


@pytest.mark.parametrize("block", REFUSED, ids=lambda block: block.__name__)
def test_what_is_not_proved_is_refused(block):
    check_refused(net(block), REFUSED[block], INPUTS, placement="post", exact=True)


def test_weights_of_two_blocks_are_not_divided_for_one():
    check_refused(ready(SharedEnd()), ["cannot be divided by"], INPUTS, placement="post", exact=True)


class Seen(Deep):
    def forward(self, x):
        y = self.branch(x)
        self.seen = {"branch": y, "sum": self.alpha * x + y}
        return self.norm(self.seen["sum"])


class Reading(DeepNet):
    """Something else reads the second block's branch, or its sum."""

    def __init__(self, what, how):
        super().__init__(Seen)
        self.what, self.how = what, how

    def forward(self, ids, mask=None):
        x = self.second(self.first(self.embed(ids)))
        return self.how(self.head(x), self.second.seen[self.what])


READS = {
    "sigmoid in the model makes something else of it": lambda x, seen: x * torch.sigmoid(seen).mean(),
    "it is an output of the model": lambda x, seen: (x, seen),
}


@pytest.mark.parametrize("what", ["branch", "sum"])
@pytest.mark.parametrize("words", READS)
def test_what_something_else_reads_is_not_divided(what, words):
    model = ready(Reading(what, READS[words]))
    words = ["model[1]: its sum cannot be divided by 1.75, the scale of its skip", words]
    check_refused(model, words, INPUTS, placement="post", exact=True)


class ScaledPre(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.norm, self.up, self.a = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), a

    def forward(self, x):
        return self.a * x + self.up(self.norm(x))


@pytest.mark.parametrize("number", [True, False])
def test_a_scaled_skip_does_not_carry_its_scale_twice(number):
    """A lane that carries the scale of each token is scaled with it."""
    model = ready(Net(lambda: ScaledPre(0.5 if number else nn.Parameter(torch.tensor(0.5)))))
    check_refused(model, ["its skip has a factor of its own"], INPUTS, placement="post", exact=True)
