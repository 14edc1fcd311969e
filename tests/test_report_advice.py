"""What a report advises: each rule says something where it applies, and nothing where it does not."""

import pytest
import yaml

from normswap.planning.plans import FittedNorm, MovedBlock, Plan, Refusal
from normswap.planning.request import Request
from normswap.report.advice.advice import advice
from normswap.report.findings.healing import recipe_for
from normswap.report.findings.model import Findings, Training
from normswap.report.findings.words import trained_verdict, verdict
from normswap.tune.shipped import shipped
from normswap.verification.generation import Generation, Sample
from normswap.verification.metrics import Stat, TokenMetrics, Worst, WorstToken
from normswap.verification.models import Comparison
from normswap.verification.run import Report


def stat(mean: float, median: float | None = None, p999: float | None = None) -> Stat:
    median = mean if median is None else median
    p999 = mean if p999 is None else p999
    return Stat(mean=mean, median=median, p99=p999, p999=p999, max=p999, worst=Worst(sequence=0, position=0))


def report(error=0.0, kl=None, top1=None, *, stored="float32", text="held out.txt", at=None, **more) -> Report:
    """A comparison of 4096 tokens with these numbers."""
    comparison = {"unmatched": more.pop("unmatched", ()), "first_divergence": at}
    output = TokenMetrics(rows=4096, error=stat(error), kl=kl, top1=top1, **more)
    return Report(
        a="a",
        b="b",
        text=text,
        inputs=(16, 256),
        stored=("float32", stored),
        device="cpu",
        versions={},
        comparison=Comparison(
            output_name="logits", output=output, sites=(), not_run=(), dtype="float64", tolerance=1e-9, **comparison
        ),
    )


def plan(claim="calibrated", words=None, **more) -> Plan:
    request = Request.of(**(words or {"norm": "dyt"}))
    made = dict(architecture="Net", model_type="net", request=request, claim=claim, reasons=(), converted=(), edits=())
    return Plan(**made, **more)


def said(kind="conversion", claim="calibrated", main=None, **more) -> list[tuple[str, str]]:
    """Level and text of all advice."""
    reports = {} if main is None else {"compared" if kind == "comparison" else "as stored": main}
    reports |= more.pop("reports", {})
    found = Findings(kind=kind, title="", changed="", claim=claim, reports=reports, **more)
    told = verdict(None if kind == "comparison" else claim, reports, found.main)
    found = found.model_copy(update={"verdict": told})
    return [(item.level, f"{item.what} {item.attempt}") for item in advice(found)]


GOOD = report(1e-15, stat(1e-20), 1.0)
CLOSE = report(0.1, stat(0.01), 0.93, at="norm")


@pytest.mark.parametrize(
    ("given", "level", "words"),
    [
        ({}, "bad", "without being measured"),
        ({"claim": "untrained", "main": CLOSE, "plan": plan("untrained")}, "bad", "every constant of the move is 1"),
        ({"main": report(1, stat(1), 0.9, mismatched=3, stored="float16")}, "bad", "3 rows .* bfloat16 or float32"),
        ({"claim": "exact", "reports": {"mathematics": GOOD}}, "note", "few tokens.*`--verify full`"),
        ({"main": CLOSE, "plan": plan()}, "note", "close to the original.*`normswap finetune to-dyt "),
        ({"main": report(0.2, stat(0.07), 0.8), "plan": plan()}, "warn", "In 20 of 100 cases.*Before it is used"),
        ({"main": report(0.2, stat(0.3), 0.5), "plan": plan()}, "bad", "In 50 of 100 cases.*to-dyt"),
        ({"main": report(0.4), "plan": plan()}, "warn", "Outputs differ by 40.0% on average"),
        (
            {"main": report(0.1, stat(0.01, 1e-4, 0.5), 0.95), "plan": plan()},
            "warn",
            "one token in a thousand is above",
        ),
        (
            {"claim": "exact", "main": report(1e-3, stat(1e-6), 1.0, stored="bfloat16")},
            "note",
            "rounding .* 1e-06 nats",
        ),
        ({"claim": "exact", "main": report(0.1, stat(0.01), 0.9, stored="float16")}, "warn", "`--dtype float32`"),
        ({"claim": "exact", "main": report(1e-15, text="random ids, seed 0")}, "note", "says little of real inputs"),
        ({"main": CLOSE, "plan": plan(calibrated_on="99 tokens of shipped Shakespeare")}, "note", "fits that kind"),
        (
            {"claim": "exact", "main": GOOD, "plan": plan("exact", refused=(Refusal(site="h.1.ln", reason="so"),))},
            "note",
            "Not all that was asked for was done; as they were: h.1.ln",
        ),
        ({"claim": "exact", "main": report(1e-15, unmatched=("h.0.ln",))}, "warn", "run in one model only.*h.0.ln"),
        ({"kind": "comparison", "claim": None, "main": CLOSE}, "warn", "part first at norm.*--dtype float32"),
        ({"kind": "comparison", "main": CLOSE, "plan": plan()}, "note", "a conversion that is not exact.*to-dyt"),
        (
            {"main": CLOSE, "plan": plan(fitted_norms=(FittedNorm(site="ln", kind="dyt", error=0.1, flat=0.5),))},
            "warn",
            "flat for many inputs .50% at ln.",
        ),
        (
            {"main": CLOSE, "plan": plan(fitted_norms=(FittedNorm(site="ln", kind="dyt", error=0.4),))},
            "warn",
            "follow the old ones badly .an error of 40% at ln.",
        ),
        (
            {
                "main": CLOSE,
                "plan": plan(
                    words={"placement": "post"},
                    moved=[
                        MovedBlock(name=f"h[{n}]", layer=n, before="pre", after="post", kl=0.001 + (n == 2))
                        for n in range(5)
                    ],
                ),
            },
            "warn",
            "Layer 2 of h costs 100%",
        ),
        (
            {"main": CLOSE, "generation": Generation(samples=(Sample(tokens=32, first_difference=1),))},
            "warn",
            "1 of 1 greedy texts differ, the first after 1 tokens",
        ),
        (
            {
                "claim": "exact",
                "main": GOOD,
                "generation": Generation(samples=(Sample(tokens=32, first_difference=9),)),
            },
            "note",
            "may change places by rounding",
        ),
    ],
)
def test_what_is_bad_is_said_with_what_to_try(given, level, words):
    import re

    found = said(**given)
    assert any(kind == level and re.search(words, text) for kind, text in found), found
    order = ["bad", "warn", "note", "good"]
    assert [kind for kind, _ in found] == sorted((kind for kind, _ in found), key=order.index)


def test_where_nothing_is_bad_nothing_is_found():
    assert [level for level, _ in said(claim="exact", main=GOOD)] == ["good"]
    assert [text for _, text in said("comparison", None, GOOD)] == ["Either checkpoint can stand for the other. "]
    assert said("map", None) == []


def test_a_tail_at_position_0_is_named():
    worst = tuple(WorstToken(sequence=n, position=0, value=1.0) for n in range(8))
    found = said(main=report(0.1, stat(0.01, 1e-4, 0.5), 0.95, worst_tokens=worst), plan=plan())
    assert any("Most of the worst stand at position 0" in text for _, text in found)


def trained(**scores: float) -> Training:
    kept = {name: {"mean": mean, "p99.9": 9.0} for name, mean in scores.items()}
    return Training(data="text", objective="lm", tokens=1000, minutes=1.0, scores=kept, curves={})


@pytest.mark.parametrize(
    ("scores", "headline", "level", "words"),
    [
        (dict(source=4, start=4.3, healed=4.01, control=4.0), "As good as its control", "good", "beside its control"),
        (dict(source=4, start=4.3, healed=4.2, control=4.0), "Not healed yet", "warn", "0.200 nats above its control"),
        (dict(source=4, start=4.3, healed=4.5, control=4.0), "Training made it worse", "warn", "4.3000 before, 4.5000"),
        (dict(source=4, start=4.3, healed=4.0), "As good as the original", "note", "`control: true`"),
        (dict(source=4, start=4.3, healed=4.1), "Not healed yet", "warn", "0.100 nats above the unconverted model"),
        # a taper starts at the original: what it leads away from there is the conversion's
        (dict(source=4, start=4, healed=4.02, control=4.0), "As good as its control", "good", "speaks against"),
        (dict(source=4, start=4, healed=4.2, control=4.19), "As good as its control", "warn", "the training, not the"),
    ],
)
def test_a_fine_tune_is_judged_by_its_control(scores, headline, level, words):
    training = trained(**scores)
    assert trained_verdict(training).headline == headline
    found = said("finetune", main=CLOSE, training=training, plan=plan())
    assert any(kind == level and words in text for kind, text in found), found


def test_a_fine_tune_may_write_something_else():
    texts = Generation(samples=(Sample(tokens=32, first_difference=1),))
    training = trained(source=4, start=4, healed=4, control=4)
    found = said("finetune", main=CLOSE, training=training, plan=plan(), generation=texts)
    assert not any("greedy" in text for _, text in found)


@pytest.mark.parametrize(
    ("kl", "top1", "level"), [(0.001, 0.97, "note"), (0.07, 0.95, "warn"), (0.001, 0.8, "warn"), (0.2, 0.9, "bad")]
)
def test_how_far_is_said_by_both_measures(kl, top1, level):
    main = report(0.1, stat(kl), top1, at="norm")
    found = verdict("calibrated", {"as stored": main}, main)
    assert found.level == level and f"{top1:.1%}" in found.sentence


def test_an_exact_claim_that_measures_otherwise_is_not_called_the_same():
    other = report(0.2, stat(0.3), 0.5, at="h.0.ln")
    assert verdict("exact", {"mathematics": other}, other).level == "bad"


def test_every_recipe_heals_what_it_converts():
    checked = 0
    for name, path in shipped().items():
        surgery = yaml.safe_load(path.read_text()).get("surgery")
        if surgery:
            assert recipe_for(plan(words=surgery)) == name
            checked += 1
    assert checked >= 9
    assert recipe_for(plan(words={"rotate": "hadamard"})) is None
    assert recipe_for(plan(words={"norm": ["dyt", "rmsnorm"], "role": ["stream", "final"]})) is not None
