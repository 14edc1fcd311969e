"""Comparing two models: what is measured, where a difference is found, and what is refused."""

import copy
import io
import json
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import normswap
from models import randomise, tiny
from normswap.apply.live import apply_plan
from normswap.errors import ObserveError, SourceError, VerificationError
from normswap.norms.kinds.rms_norm import RMSNorm
from normswap.norms.spec import NormSpec
from normswap.report.comparison import comparison_table, verdict
from normswap.understand.normmap import find_sites
from normswap.verification.inputs import evaluation_inputs, redrawn
from normswap.verification.live import measure_live
from normswap.verification.metrics import TokenComparison, compare_logits
from normswap.verification.models import compare_models
from normswap.verification.run import Report, verify

IDS = torch.randint(3, 90, (4, 24), generator=torch.Generator().manual_seed(0))
SMALL = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=99,
    max_position_embeddings=64,
)  # fmt: skip


def compare(a, b, batches=(IDS,), **options):
    return compare_models(a, b, list(batches), find_sites(a), find_sites(b), **options)


def centre_gpt2(model):
    """Every writer of the stream centred by hand, and every LayerNorm replaced by an RMSNorm with its parameters."""
    body = model.transformer
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
        for table in (body.wte, body.wpe):
            table.weight -= table.weight.mean(-1, keepdim=True)
        for block in body.h:
            for writer in (block.attn.c_proj, block.mlp.c_proj):
                writer.weight -= writer.weight.mean(-1, keepdim=True)
                writer.bias -= writer.bias.mean()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            norm = RMSNorm(module.normalized_shape[0], module.eps, bias=True).to(module.weight.dtype)
            norm.load_state_dict(module.state_dict())
            model.set_submodule(path, norm)
    return model.eval()


# -- logits --------------------------------------------------------------------------------------------------------


def test_metrics_equal_an_independent_computation():
    generator = torch.Generator().manual_seed(1)
    a, b = (3 * torch.randn(2, 7, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(11, (2, 7), generator=generator)
    found = compare_logits(a, b, targets)

    def softmax(row):
        top = max(row)
        powers = [math.exp(v - top) for v in row]
        return [p / sum(powers) for p in powers]

    kl, error, same, entropy = [], [], [], []
    for row_a, row_b, target in zip(a.view(-1, 11).tolist(), b.view(-1, 11).tolist(), targets.view(-1), strict=True):
        p, q = softmax(row_a), softmax(row_b)
        kl.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
        error.append(math.dist(row_a, row_b) / math.hypot(*row_a))
        same.append(row_a.index(max(row_a)) == row_b.index(max(row_b)))
        entropy.append(-math.log(q[target]))
    assert found.rows == 14
    assert found.kl.mean == pytest.approx(sum(kl) / 14, rel=1e-12)
    assert found.kl.max == pytest.approx(max(kl), rel=1e-12)
    assert (found.kl.worst.sequence, found.kl.worst.position) == divmod(kl.index(max(kl)), 7)
    assert found.error.median == pytest.approx(sorted(error)[6], rel=1e-12)
    assert found.top1 == pytest.approx(sum(same) / 14)
    assert found.cross_entropy_b.mean == pytest.approx(sum(entropy) / 14, rel=1e-12)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e-9])
def test_small_kl_is_not_lost_in_rounding(size):
    """To second order, KL is half the variance of the change of the logits under p."""
    a, change = torch.randn(2, 1, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = compare_logits(a, a + size * change).kl.mean
    p = a.softmax(-1)
    variance = (p * change**2).sum() - (p * change).sum() ** 2
    assert found == pytest.approx(size**2 * variance.item() / 2, rel=max(2 * size, 1e-6))


def test_kl_of_certain_predictions_is_finite():
    a = torch.tensor([[0.0, -1e9, -2000.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, -1e9, -1.0]], dtype=torch.float64)
    assert compare_logits(a, b).kl.mean == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-9)


def test_one_blown_up_token_shows_in_the_tail_and_nowhere_else():
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(4, 500, 20, generator=generator)
    b = a + 1e-6 * torch.randn(a.shape, generator=generator)
    b[2, 123:125] += 50 * torch.randn(20, generator=generator)
    gathered = TokenComparison(decode=lambda ids: " ".join(map(str, ids)))
    gathered.add(a, b, ids=torch.arange(2000).view(4, 500))
    found = gathered.metrics()
    for stat in (found.error, found.kl):
        assert stat.median < 1e-5
        assert stat.max > 1 and stat.p999 > 1  # 2 of 2000 tokens
        assert stat.worst.sequence == 2 and 123 <= stat.worst.position < 125
        assert stat.worst.token == str(1000 + stat.worst.position)
        assert stat.worst.before.split()[-1] == str(1000 + stat.worst.position - 1)


def test_batches_add_up():
    a, b = torch.randn(2, 6, 5, 9, generator=torch.Generator().manual_seed(4))
    gathered = TokenComparison()
    for part in range(0, 6, 2):
        gathered.add(a[part : part + 2], b[part : part + 2])
    assert gathered.metrics() == compare_logits(a, b)


def test_a_tie_decides_nothing():
    a = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.5, 0.0]])
    b = torch.tensor([[1.0, 1.1, 0.0], [0.5, 1.0, 0.0]])
    assert compare_logits(a, b).top1 == 0.5


def test_not_finite_in_one_is_counted_and_left_out():
    a = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(5))
    b = a.clone()
    b[0, 3, 2] = torch.nan
    b[0, 1, 0] = torch.inf
    found = compare_logits(a, b)
    assert (found.mismatched, found.rows, found.error.max) == (2, 3, 0)


def test_a_masked_vocabulary_compares_and_shared_nan_rows_do_not():
    a = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(6))
    a[..., 6:] = -torch.inf
    a[0, 0, 3] = torch.nan
    found = compare_logits(a, a.clone())
    assert (found.mismatched, found.not_finite, found.rows) == (0, 1, 4)
    assert found.error.max == found.kl.max == 0


# -- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "bloom", "cohere"])
def test_a_model_equals_itself(model_type):
    model = tiny(model_type).double()
    found = compare(model, copy.deepcopy(model))
    assert found.output.error.max == found.output.kl.max == 0 and found.output.top1 == 1
    assert len(found.sites) >= 3 and all(site.error_max == 0 for site in found.sites)
    assert found.first_divergence is None and found.unmatched == found.not_run == ()


def test_cross_entropy_is_the_models_own_loss():
    model = tiny("gpt2").double()
    with torch.no_grad():
        loss = model(input_ids=IDS, labels=IDS).loss.item()
    assert compare(model, model).output.cross_entropy_a.mean == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_divergence_is_the_site_after_the_change(layer):
    model = tiny("gpt2").double()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.transformer.h[layer].attn.c_proj.weight[3, 5] += 1e-3
    found = compare(model, changed)
    assert found.first_divergence == f"transformer.h.{layer}.ln_2"
    before = [site for site in found.sites if site.site < f"transformer.h.{layer}.ln_2"]
    assert before and all(site.error_max == 0 for site in before)


def test_a_change_behind_the_last_norm_is_found_at_the_output():
    model = tiny("llama").double()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.lm_head.weight[7, 7] += 1e-3
    assert compare(model, changed).first_divergence == "output"


def test_a_site_the_output_is_blind_to_is_found():
    """The MLP of a layer does nothing, so what its norm receives shows in no logit."""
    model = tiny("gpt_neox", use_parallel_residual=True).double()
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.zero_()
    changed = copy.deepcopy(model)
    changed.gpt_neox.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda m, args: (args[0] * -1,))
    found = compare(model, changed)
    assert found.output.error.max == 0
    assert found.first_divergence == "gpt_neox.layers.1.post_attention_layernorm"


def test_what_a_site_gives_is_compared_where_the_output_is_blind_to_it():
    model = tiny("gpt_neox", use_parallel_residual=True).double()
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.zero_()
    changed = copy.deepcopy(model)
    changed.gpt_neox.layers[1].post_attention_layernorm.eps *= 1.01
    sites = find_sites(model)
    found = compare_models(model, changed, [IDS], sites, sites)
    site = next(site for site in found.sites if site.output_error_max > 0)
    assert found.output.error.max == site.error_max == 0
    assert found.first_divergence == site.site == "gpt_neox.layers.1.post_attention_layernorm"
    assert 1e-9 < site.output_error_max < 1e-3


@pytest.mark.parametrize("request_", [dict(norm="rmsnorm"), dict(norm="rmsnorm", fold=True), dict(fold=True)])
def test_an_output_that_is_centred_or_folded_is_put_back(request_):
    """BLOOM's embedding norm writes to the stream: its output is centred, and there is no such kind of norm."""
    model = tiny("bloom").double()
    plan = normswap.plan(model, **request_, tied="untie", partial=True)
    found = measure_live(model, plan, [{"input_ids": IDS}])
    centred = any(edit.edit == "centre_output" for edit in plan.edits)
    assert centred == ("norm" in request_) and len(found.sites) == 6 and found.unmatched == ()
    assert found.first_divergence is None and found.worst_error <= 1e-12  # measured 3e-15
    off = apply_plan(copy.deepcopy(model), plan)
    off.transformer.word_embeddings_layernorm.register_forward_hook(lambda m, args, y: y * (1 + 1e-6))
    worse = compare_models(model, off, [IDS], find_sites(model), find_sites(off))
    assert worse.first_divergence == "transformer.word_embeddings_layernorm"


class SeveralOutputs(nn.Module):
    """A norm whose output is given out in several places, beside noise that is drawn anew in every pass."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, input_ids):
        x = self.norm(torch.sin(input_ids.double().unsqueeze(-1) * torch.arange(1, 9)))
        noisy = x + torch.randn(x.shape, dtype=x.dtype)
        masked = x.masked_fill(input_ids.unsqueeze(-1) % 2 == 0, -torch.inf)
        nested = {"states": (x, masked), "mems": [torch.rand(3)], "loss": x.mean()}
        return {"counts": input_ids, "first": noisy, "nested": nested}


def test_every_floating_output_is_compared_under_the_same_noise():
    model = SeveralOutputs().double().eval()
    torch.manual_seed(7)
    found = compare_models(model, copy.deepcopy(model), [IDS])
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert drawn == torch.rand(1)  # the generator is where it was
    assert found.output_name == "first" and found.output.error.max == 0
    names = ["nested.states.0", "nested.states.1", "nested.loss"]  # what is kept for generation is not among them
    assert [other.name for other in found.others] == names and all(other.error_max == 0 for other in found.others)
    assert found.others[0].rows == IDS.numel() and found.others[2].rows == 1

    for place, name in ((0, "output nested.states.0"), (1, "output nested.states.1")):
        changed = copy.deepcopy(model)

        def disturb(module, args, output, place=place):
            states = list(output["nested"]["states"])
            states[place] = torch.where(states[place].isfinite(), states[place], 0.0) if place else 2 * states[place]
            return {**output, "nested": {**output["nested"], "states": tuple(states)}}

        changed.register_forward_hook(disturb)
        found = compare_models(model, changed, [IDS])
        assert found.first_divergence == name
        assert (found.others[1].mismatched > 0) == (place == 1)  # finite where the original is not


def test_the_encoders_output_counts():
    model = tiny("t5").double()
    batch = {"input_ids": IDS, "decoder_input_ids": IDS[:, :9], "use_cache": False}
    assert [other.name for other in compare(model, model, [batch]).others] == ["encoder_last_hidden_state"]


def test_exact_conversion_agrees_at_every_site_and_folding_does_not_matter():
    model = tiny("gpt2").double()
    converted = centre_gpt2(copy.deepcopy(model))
    with torch.no_grad():  # a gain folded into its reader: y = W (g n + b) + c
        norm, reader = converted.transformer.ln_f, converted.lm_head
        bias = reader.weight @ norm.bias
        reader.weight *= norm.weight
        norm.weight.fill_(1), norm.bias.zero_()
        reader.bias = nn.Parameter(bias)
    found = compare(model, converted)
    assert len(found.sites) == 5
    assert max(site.error_max for site in found.sites) <= 1e-12  # measured 3e-15
    assert 0 < max(site.output_error_max for site in found.sites) <= 1e-12  # measured 3e-15
    assert found.output.error.max <= 1e-12
    assert found.first_divergence is None
    assert min(site.mean_a for site in found.sites) > 0.1 and max(site.mean_b for site in found.sites) < 1e-12


def test_a_forgotten_centring_is_found():
    model = tiny("gpt2").double()
    converted = centre_gpt2(copy.deepcopy(model))
    with torch.no_grad():
        converted.transformer.wpe.weight.copy_(model.transformer.wpe.weight)
    found = compare(model, converted)
    assert found.first_divergence == "transformer.h.0.ln_1"
    assert found.output.error.max > 1e-3


def test_lifting_sees_below_float32():
    """A weight moved by parts in 1e11 moves the output in proportion, unless norms round to float32 inside."""
    model = tiny("llama").double()

    def error(size, lift):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.model.layers[0].mlp.down_proj.weight *= 1 + size
        return compare(model, changed, lift=lift).output.error.mean

    assert 1e-13 < error(1e-11, lift=True) < 1e-9
    assert error(4e-11, lift=True) == pytest.approx(4 * error(1e-11, lift=True), rel=1e-3)
    small, large = error(1e-11, lift=False), error(4e-11, lift=False)
    assert large == 0 or large != pytest.approx(4 * small, rel=1e-1)  # measured: both lost, or both one rounding


def test_nan_in_one_model_is_reported_at_its_first_site():
    model = tiny("gpt2").double()
    broken = copy.deepcopy(model)
    broken.transformer.h[0].mlp.register_forward_hook(
        lambda m, args, out: out.index_fill(1, torch.tensor([5]), math.nan)
    )
    found = compare(model, broken)
    assert found.first_divergence == "transformer.h.1.ln_1"
    assert found.output.mismatched > 0
    with pytest.raises(VerificationError, match="no row.*finite"):
        dead = copy.deepcopy(model)
        dead.lm_head.register_forward_hook(lambda m, args, out: out * math.nan)
        compare(dead, dead)


def test_sites_of_one_model_only_are_named():
    model = tiny("gpt2").double()
    other = copy.deepcopy(model)
    other.transformer.h[1].forward = lambda x, *args, **kwargs: x  # its norms do not run
    other.transformer.ln_f = nn.Identity()  # no norm, and yet in the place of one: compared as if it were
    found = compare(model, other)
    assert found.unmatched == ("transformer.h.1.ln_1", "transformer.h.1.ln_2")
    assert found.first_divergence == "transformer.ln_f"


class ConstantInput(nn.Module):
    """A norm on inputs that are constant along the channels but for rounding of the size `noise`, beside an output."""

    def __init__(self, noise):
        super().__init__()
        self.norm, self.noise = nn.LayerNorm(8), noise

    def forward(self, input_ids):
        x = input_ids.double().unsqueeze(-1).expand(-1, -1, 8)
        self.norm(x + self.noise * torch.arange(8))
        return {"counts": input_ids, "hidden": x}


def test_rounding_around_a_constant_is_no_difference():
    spec = NormSpec(kind="layernorm", axes=(-1,), width=8, gain="w", weight="weight", bias="bias", eps=1e-5)
    models = [ConstantInput(noise).double().eval() for noise in (1e-13, -1e-13)]
    found = compare_models(*models, [IDS], [("norm", spec)], [("norm", spec)])
    assert found.output_name == "hidden"  # the first floating one
    assert found.sites[0].error_max > 1 and found.sites[0].power < 1e-9
    assert found.first_divergence is None


def test_models_that_are_no_causal_language_models():
    bert = randomise(BertForMaskedLM(BertConfig(**SMALL))).double().eval()
    body = randomise(BertModel(BertConfig(**SMALL))).double().eval()
    vit = randomise(ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8))).double().eval()
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=99, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8))
    t5 = randomise(t5).double().eval()

    masked = compare(bert, bert).output
    assert masked.kl.max == 0 and masked.top1 == 1 and masked.cross_entropy_a is None  # nothing is predicted next
    hidden = compare(body, body)
    assert hidden.output_name == "last_hidden_state" and hidden.output.kl is None and hidden.output.error.max == 0
    pixels = {"pixel_values": torch.randn(3, 3, 16, 16)}
    assert compare(vit, vit, [pixels]).output.rows == 3
    both = compare(t5, t5, [{"input_ids": IDS, "decoder_input_ids": IDS[:, :9]}])
    assert both.output.rows == 4 * 9 and both.output.cross_entropy_a is not None and len(both.sites) == 12


def test_models_that_cannot_be_compared():
    model = tiny("gpt2").double()
    with pytest.raises(VerificationError, match="training mode"):
        compare_models(copy.deepcopy(model).train(), model, [IDS])
    with pytest.raises(VerificationError, match="float64 and torch.float32"):
        compare_models(model, tiny("gpt2"), [IDS])
    with pytest.raises(VerificationError, match="one shape"):
        compare_models(model, tiny("gpt2", vocab_size=98).double(), [IDS])
    with pytest.raises(ObserveError, match="model A.*fewer tokens"):
        compare_models(model, model, [torch.ones(1, 65, dtype=torch.long)])
    with pytest.raises(VerificationError, match="nothing to compare"):
        compare_models(model, model, [])


# -- inputs --------------------------------------------------------------------------------------------------------


def test_inputs_drawn_again_keep_what_has_a_meaning():
    config = BertConfig(vocab_size=50, pad_token_id=0, image_token_id=7)
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    example = {"input_ids": torch.tensor([[7, 7, 3, 4, 0]]), "pixel_values": torch.arange(6.0).view(1, 2, 3),
               "attention_mask": torch.ones(1, 5), "sizes": torch.tensor([[2, 3]]), "use_cache": False}  # fmt: skip
    first, second = (redrawn(example, config, seed) for seed in (0, 1))
    for drawn in (first, second):
        ids = drawn["input_ids"]
        assert ids[0, :2].tolist() == [7, 7] and ids[0, 4] == 0 and not set(ids[0, 2:4].tolist()) & {0, 7}
        assert drawn["pixel_values"].flatten().sort().values.tolist() == list(range(6))
        assert drawn["attention_mask"].all() and drawn["sizes"] is example["sizes"] and drawn["use_cache"] is False
    assert not torch.equal(first["pixel_values"], second["pixel_values"])
    assert not torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(redrawn({"mask": mask}, None, 0)["mask"].sum(), mask.sum())


def test_windows_are_as_long_as_the_model_takes():
    """Some count their positions from the padding's id on: fewer are left than the configuration says."""
    config = RobertaConfig(**{**SMALL, "max_position_embeddings": 34}, pad_token_id=1)
    model = randomise(RobertaForMaskedLM(config)).eval()
    batches, shape, described = evaluation_inputs(model, None, None, 200)
    assert 16 <= shape[1] <= 32 and "random" in described
    assert all(torch.isfinite(model(**batch).logits).all() for batch in batches)


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounded(checkpoints, tmp_path_factory):
    """The trained GPT-2, every weight moved by a few parts in 1e8."""
    folder = tmp_path_factory.mktemp("rounded")
    for file in (checkpoints / "gpt2-shakespeare").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        weights[name] = (value.double() * (1 + 4e-8)).float()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_verify_trained_checkpoints(checkpoints, rounded):
    steps = []
    report = verify(
        checkpoints / "gpt2-shakespeare", rounded, tokens=1024,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    found = report.comparison
    assert report.inputs == (4, 256) and "Shakespeare" in report.text and report.stored == ("float32", "float32")
    assert found.dtype == "float64" and len(found.sites) == 13
    assert 0 < found.output.error.max < 1e-5 and found.first_divergence is None
    assert found.output.error.worst.token is not None
    assert steps == [(1, 1)]
    assert Report.model_validate(json.loads(report.model_dump_json())) == report
    shown = Console(width=120, file=io.StringIO())
    shown.print(comparison_table(report))
    text = shown.file.getvalue()
    assert "transformer.h.*.ln_1" in text and verdict(report) in text and "No difference" in text
    assert found.output.error.worst.token.replace("\n", "\u21b5") in text


def test_verify_tells_different_models_apart(checkpoints):
    report = verify(checkpoints / "gpt_neox-shakespeare", checkpoints / "llama-shakespeare", tokens=256)
    found = report.comparison
    assert found.first_divergence == "output" and found.output.kl.mean > 0.1
    assert len(found.unmatched) == 26  # 13 norms each, none at the same path
    assert "differ" in verdict(report)
    assert found.output.cross_entropy_a.mean == pytest.approx(4.15, abs=0.5)


def test_half_precision_checkpoints_run_in_float32(tmp_path):
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    report = verify(tmp_path / "half", tmp_path / "half", tokens=40)
    assert report.comparison.dtype == "float32" and report.stored == ("bfloat16", "bfloat16")
    assert report.comparison.output.error.max == 0
    assert "random ids" in report.text  # there is no tokenizer
    assert report.comparison.output.error.worst.token is None


def test_refusals_of_verify(checkpoints, tmp_path):
    gpt2 = checkpoints / "gpt2-shakespeare"
    tiny("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(VerificationError, match="1024 tokens.*99"):
        verify(gpt2, tmp_path / "other")
    with pytest.raises(VerificationError, match="float8"):
        verify(gpt2, gpt2, dtype="float8")
    with pytest.raises(VerificationError, match="cannot be put on abacus"):
        verify(gpt2, gpt2, device="abacus")
    with pytest.raises(SourceError, match="nowhere"):
        verify(gpt2, tmp_path / "nowhere")

    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights.pop("transformer.h.1.ln_2.weight")
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="h.1.ln_2.weight.*random"):
        verify(tmp_path / "other", tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="found no weights"):
        verify(tmp_path / "other", tmp_path / "other")


def test_of_several_parts_that_read_text_the_smallest_vocabulary_counts():
    from transformers import MusicgenConfig, MusicgenDecoderConfig, T5Config

    from normswap.verification.inputs import of_text

    config = MusicgenConfig(text_encoder=T5Config(vocab_size=99).to_dict(),
                            audio_encoder={"model_type": "encodec"},
                            decoder=MusicgenDecoderConfig(vocab_size=50).to_dict())  # fmt: skip
    assert of_text(config, "vocab_size") == 50 and of_text(config.decoder, "vocab_size") == 50
