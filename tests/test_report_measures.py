"""What verification measures for a report: percentiles and histograms, worst tokens, streams, greedy text."""

import copy
import math
from contextlib import ExitStack

import pytest
import torch
from transformers import AutoTokenizer

from models import tiny
from normswap.checkpoint.source import Source
from normswap.understand.normmap import find_sites
from normswap.verification.generation import NEW_TOKENS, generated
from normswap.verification.histogram import histogram
from normswap.verification.loaded import open_model
from normswap.verification.metrics import Stat, TokenComparison, compare_logits
from normswap.verification.models import compare_models
from normswap.verification.on_disk import FromDisk
from normswap.verification.proof import Proof

IDS = torch.randint(3, 90, (3, 20), generator=torch.Generator().manual_seed(0))


def test_a_histogram_counts_every_value_in_its_bin():
    values = torch.tensor([0.0, 1e-9, 1.5e-9, 3e-3, 3.2e-3, 0.5, 7.0, math.inf, 1e-60], dtype=torch.float64)
    found = histogram(values)
    assert (found.zero, found.infinite, found.total) == (2, 1, 9)
    edges, checked = found.edges(), 0
    for left, right, count in zip(edges, edges[1:], found.counts, strict=False):
        assert count == int(((values >= left * (1 - 1e-12)) & (values < right * (1 - 1e-12))).sum())
        checked += count
    assert checked == 6 and found.counts[0] and found.counts[-1]


def test_the_histogram_of_nothing_but_zeros_is_empty():
    found = histogram(torch.zeros(5))
    assert found.counts == () and found.zero == found.total == 5


def test_percentiles_and_histogram_are_of_all_tokens():
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(4, 300, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    found = compare_logits(a, b)
    kl = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).flatten().sort().values
    assert found.kl.p99 == pytest.approx(kl[math.ceil(0.99 * 1199)].item(), rel=1e-12)
    assert found.kl.median <= found.kl.p99 <= found.kl.p999 <= found.kl.max
    assert found.kl.histogram.total == found.error.histogram.total == 1200
    assert found.cross_entropy_a is None


def test_the_worst_tokens_are_shown_with_what_each_model_expects():
    a = torch.randn(2, 50, 30, generator=torch.Generator().manual_seed(2))
    b = a.clone()
    b[1, 7, 4] += 50
    b[0, 3, 5] += 20
    gathered = TokenComparison(decode=lambda ids: " ".join(map(str, ids)))
    ids = torch.randint(3, 30, (2, 50))
    gathered.add(a, b, ids=ids)
    worst = gathered.metrics().worst_tokens
    assert [(t.sequence, t.position) for t in worst[:2]] == [(1, 7), (0, 3)]
    assert [t.value for t in worst] == sorted((t.value for t in worst), reverse=True) and len(worst) == 8
    assert (worst[0].token, worst[0].chosen_b) == (str(ids[1, 7].item()), "4")
    assert worst[0].chosen_a == str(a[1, 7].argmax().item())


def test_labels_are_not_taken_for_tokens():
    """A classifier of tokens has fewer classes than ids, and none of them is a word."""
    gathered = TokenComparison(decode=lambda ids: " ".join(map(str, ids)))
    a = torch.randn(1, 6, 4)
    gathered.add(a, a + 0.1 * torch.randn(1, 6, 4), ids=torch.tensor([[9, 8, 7, 6, 5, 4]]))
    worst = gathered.metrics().worst_tokens
    assert len(worst) == 6 and all(t.token is not None and t.chosen_a is None for t in worst)


# -- streams ---------------------------------------------------------------------------------------------------------


def test_streams_are_what_norms_receive_in_each_model():
    a = tiny("gpt2")
    b = copy.deepcopy(a)
    with torch.no_grad():
        b.transformer.wte.weight.mul_(3)
    moved = {"transformer.h.0.ln_2"}
    found = compare_models(a, b, [IDS[:2], IDS[2:]], find_sites(a), find_sites(b), moved=moved).streams
    assert [site.site for site in found] == [path for path, _ in find_sites(a)]
    checked = 0
    for site in found:
        for model, stat in ((a, site.a), (b, site.b)):
            x = _received(model, site.site).double()
            rms = x.square().mean(-1).sqrt()
            # measured: 4e-8, as the models are in float32
            assert stat.mean == pytest.approx(x.mean().item(), rel=1e-4, abs=1e-6)
            assert stat.rms == pytest.approx(rms.mean().item(), rel=1e-5)
            assert stat.cv == pytest.approx((rms.std(unbiased=False) / rms.mean()).item(), rel=1e-4, abs=1e-5)
            checked += 1
    assert checked == 10
    assert found[0].b.rms > 2 * found[0].a.rms


@torch.no_grad()
def _received(model, path):
    """All that the norm at `path` receives on all rows together."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(IDS)
    handle.remove()
    return seen[0]


# -- greedy text -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(small):
    model = open_model(Source.open(small["gpt2"]))
    return model, AutoTokenizer.from_pretrained(small["gpt2"])


def _batches(tokenizer):
    ids = tokenizer("To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer " * 4)
    return [{"input_ids": torch.tensor(ids["input_ids"])[:60].reshape(2, 30)}]


def test_greedy_text_is_the_most_probable_token_each_time(pair):
    model, tokenizer = pair
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.transformer.h[1].mlp.c_proj.weight.add_(0.3 * torch.randn_like(other.transformer.h[1].mlp.c_proj.weight))
    batches = _batches(tokenizer)
    found = generated(model, other, tokenizer, batches)
    assert found.why_not is None and len(found.samples) == 2
    row = batches[0]["input_ids"][0][:15]
    written = []
    for m in (model, other):
        ids = row.clone()
        for _ in range(NEW_TOKENS):
            with torch.no_grad():
                ids = torch.cat([ids, m(ids[None]).logits[0, -1].argmax()[None]])
            if ids[-1] == tokenizer.eos_token_id:
                break
        written.append(ids[len(row) :].tolist())
    first = next((i for i, (x, y) in enumerate(zip(*written, strict=False)) if x != y), None)
    sample = found.samples[0]
    assert sample.first_difference == first is not None
    assert sample.prompt == tokenizer.decode(row)
    assert sample.same + sample.text_a == tokenizer.decode(written[0])
    assert sample.same + sample.text_b == tokenizer.decode(written[1])
    alike = generated(model, model, tokenizer, batches).samples
    assert alike and all(s.first_difference is None and s.text_a == "" for s in alike)


def test_a_large_model_writes_less(pair):
    model, tokenizer = pair
    size = sum(p.numel() for p in model.parameters())
    found = generated(model, model, tokenizer, _batches(tokenizer), reads=10.5 * size)
    assert found.new_tokens == 10 and found.samples[0].tokens == 10


def test_models_that_read_weights_from_disk_write_the_same(small, pair):
    source, tokenizer = Source.open(small["gpt2"]), pair[1]
    with ExitStack() as opened:
        found = FromDisk(open_model(source, device_map="meta"), source.folder, opened)
        writing = generated(found.model(torch.float64), pair[0].double(), tokenizer, _batches(tokenizer), on_disk=True)
    assert writing.why_not is None and [sample.first_difference for sample in writing.samples] == [None, None]


def test_an_encoder_decoder_writes_too(small):
    model, tokenizer = tiny("bart"), AutoTokenizer.from_pretrained(small["gpt2"])
    ids = IDS[:, :12]
    found = generated(model, model, tokenizer, [{"input_ids": ids, "decoder_input_ids": ids}])
    assert found.why_not is None and len(found.samples) == 3 and found.samples[0].first_difference is None


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"tokenizer": None}, "no tokenizer"),
        ({"reads": 10}, "too long here"),
        ({"batches": [{"input_ids": IDS, "pixel_values": torch.rand(3, 3)}]}, "not measured on text alone"),
    ],
)
def test_where_nothing_is_written_it_says_why(pair, options, why):
    model, tokenizer = pair
    asked = {"tokenizer": tokenizer, "batches": _batches(tokenizer)} | options
    found = generated(model, model, asked.pop("tokenizer"), asked.pop("batches"), **asked)
    assert found.samples == () and why in found.why_not


def test_a_model_that_does_not_generate_says_so(pair):
    found = generated(tiny("bert"), tiny("bert"), pair[1], _batches(pair[1]))
    assert "BertForMaskedLM does not generate text" in found.why_not


# -- records of other versions, and texts ------------------------------------------------------------------------------


def test_reports_of_older_versions_are_read():
    stat = {"mean": 1.0, "median": 1.0, "p999": 1.0, "max": 1.0, "worst": {"sequence": 0, "position": 0}}
    assert Stat.model_validate(stat).p99 is None and Stat.model_validate(stat).histogram is None
    assert Proof.model_validate({"mode": "none", "claim": "exact"}).generation is None
