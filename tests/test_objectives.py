"""Objectives against what they are by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertForSequenceClassification, BertModel

from models import tiny, tiny_config
from normswap.errors import RecipeError
from normswap.tune.objectives import Losses
from normswap.tune.recipe import Recipe
from sweep.zoo import randomise

STAGE = {"steps": 1, "learning_rate": 1e-3}


def objectives(*given):
    """As a recipe has them."""
    recipe = {"model": "m", "output": "o", "stages": [STAGE], "objective": list(given)}
    return Recipe.of(recipe | {"data": {"label": "y", "pack": False}}).objective


def moved(model: nn.Module, seed: int = 5) -> nn.Module:
    """A model near another one."""
    g = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=g))
    return other


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[nn.Module, nn.Module]]:
    """By name, a model and one near it, in eval mode."""
    config = tiny_config("bert", num_labels=3)
    torch.manual_seed(0)
    found = {
        "gpt2": tiny("gpt2"),
        "llama": tiny("llama"),
        "bert": tiny("bert"),
        "encoder": randomise(BertModel(config), 0).eval(),
        "classifier": randomise(BertForSequenceClassification(config), 0).eval(),
    }
    return {name: (model, moved(model)) for name, model in found.items()}


def batch_of(length: int = 9) -> dict[str, torch.Tensor]:
    """Three texts of which two are padded, on the right."""
    ids = torch.randint(3, 99, (3, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 3:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def outputs(model: nn.Module, batch: dict[str, torch.Tensor], **options):
    given = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        return model(**given, **options)


def close(found: torch.Tensor | float, expected: float) -> bool:
    return float(found) == pytest.approx(expected, rel=1e-5)  # 3e-7: objectives compute in float32


# ---- each by hand


def test_next_tokens(models):
    model, _ = models["gpt2"]
    batch = batch_of()
    logits = outputs(model, batch).logits
    found = []
    for row, length in enumerate([9, 5, 3]):
        for i in range(length - 1):
            found.append(-float(logits[row, i].log_softmax(-1)[batch["input_ids"][row, i + 1]]))
    losses = Losses(objectives("lm"))
    assert len(found) == 8 + 4 + 2
    assert close(losses.loss(model, batch)[0].detach(), sum(found) / len(found))
    scores = losses.scores(model, batch)
    assert scores.shape == (3, 8) and int(scores.isfinite().sum()) == 14
    assert scores[1].isfinite().tolist() == [True] * 4 + [False] * 4
    assert close(scores.nanmean(), sum(found) / len(found))
    # transformers' own, on a row without padding
    whole = {"input_ids": batch["input_ids"][:1]}
    assert close(losses.loss(model, whole)[0].detach(), float(model(**whole, labels=whole["input_ids"]).loss.detach()))


def test_masked_tokens(models):
    model, _ = models["bert"]
    batch = batch_of()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 2], labels[0, 7], labels[2, 1] = 11, 12, 13
    losses = Losses(objectives("mlm"))
    logits = outputs(model, batch).logits.log_softmax(-1)
    by_hand = -float(logits[0, 2, 11] + logits[0, 7, 12] + logits[2, 1, 13]) / 3
    assert close(losses.loss(model, batch | {"labels": labels})[0].detach(), by_hand)
    scores = losses.scores(model, batch | {"labels": labels})
    assert scores.shape == (3, 9) and int(scores.isfinite().sum()) == 3
    none = torch.full_like(labels, -100)  # a batch in which nothing is masked has no loss, and gradients that are 0
    loss = losses.loss(model, batch | {"labels": none})[0]
    loss.backward()
    assert float(loss.detach()) == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
    model.zero_grad()


def test_classes(models):
    model, _ = models["classifier"]
    batch = batch_of() | {"labels": torch.tensor([2, 0, 1])}
    losses = Losses(objectives("classification"))
    logits = outputs(model, batch).logits.log_softmax(-1)
    by_hand = [-float(logits[row, label]) for row, label in enumerate([2, 0, 1])]
    assert close(losses.loss(model, batch)[0].detach(), sum(by_hand) / 3)
    assert losses.scores(model, batch).flatten().tolist() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation(models, temperature):
    teacher, student = models["gpt2"]
    batch = batch_of()
    t, s = (outputs(m, batch).logits.double() / temperature for m in (teacher, student))
    found = []
    for row, length in enumerate([9, 5, 3]):
        for i in range(length):
            p, q = t[row, i].softmax(-1), s[row, i].softmax(-1)
            found.append(temperature**2 * float((p * (p.log() - q.log())).sum()))
    losses = Losses(objectives({"kind": "distill", "temperature": temperature}), teacher)
    assert close(losses.loss(student, batch)[0].detach(), sum(found) / len(found))
    assert int(losses.scores(student, batch).isfinite().sum()) == 17


def test_distillation_of_a_classifier(models):
    teacher, student = models["classifier"]
    batch = batch_of() | {"labels": torch.tensor([2, 0, 1])}
    t, s = (outputs(m, batch).logits.double().softmax(-1) for m in (teacher, student))
    by_hand = float((t * (t.log() - s.log())).sum(-1).mean())
    assert close(Losses(objectives("distill"), teacher).loss(student, batch)[0].detach(), by_hand)


@pytest.mark.parametrize("name, centred", [("gpt2", True), ("llama", False), ("encoder", True)])
def test_hidden_states(models, name, centred):
    teacher, student = models[name]
    batch = batch_of()
    a, b = (outputs(m, batch, output_hidden_states=True).hidden_states[1:] for m in (student, teacher))
    assert len(a) == 2  # of each block; embeddings are no block's
    found = []
    for x, y in zip(a, b, strict=True):
        for row, length in enumerate([9, 5, 3]):
            for i in range(length):
                u, v = x[row, i].double(), y[row, i].double()
                if centred:
                    u, v = u - u.mean(), v - v.mean()
                found.append(1 - float(u @ v / (u.norm() * v.norm())))
    losses = Losses(objectives("hidden"), teacher, centred=centred)
    assert close(losses.loss(student, batch)[0].detach(), sum(found) / len(found))
    other = Losses(objectives("hidden"), teacher, centred=not centred).loss(student, batch)[0].detach()
    assert not close(other, sum(found) / len(found))
    # LayerNorms do not see a mean, and norms no scale: states that differ in these are the same
    if centred:
        states = outputs(teacher, batch, output_hidden_states=True)
        same = [3 * h + 7 for h in states.hidden_states]
        assert float(losses.loss(_Gives(states, hidden_states=same), batch)[0]) < 1e-6


@pytest.mark.parametrize("name", ["encoder", "gpt2"])
def test_embeddings(models, name):
    teacher, student = models[name]
    batch = batch_of()
    found = []
    for model in (student, teacher):
        last = outputs(model, batch, output_hidden_states=True).hidden_states[-1].double()
        found.append([last[row, :length].mean(0) for row, length in enumerate([9, 5, 3])])
    by_hand = [1 - float(u @ v / (u.norm() * v.norm())) for u, v in zip(*found, strict=True)]
    losses = Losses(objectives("embedding"), teacher)
    assert close(losses.loss(student, batch)[0].detach(), sum(by_hand) / 3)
    assert losses.scores(student, batch).flatten().tolist() == pytest.approx(by_hand, rel=1e-4)


class _Gives(nn.Module):
    """A model that gives what it is made with."""

    def __init__(self, outputs, **other):
        super().__init__()
        self.outputs = copy.copy(outputs)
        for name, value in other.items():
            self.outputs[name] = value

    def forward(self, **inputs):
        return self.outputs


# ---- together


def test_objectives_are_added_by_their_weights(models):
    teacher, student = models["gpt2"]
    batch = batch_of()
    parts = [{"kind": "lm", "weight": 2.0}, {"kind": "distill", "weight": 0.5, "temperature": 2}, {"kind": "hidden"}]
    alone = [float(Losses(objectives(part), teacher).loss(student, batch)[0].detach()) for part in parts]
    whole = Losses(objectives(*parts), teacher)
    assert float(whole.loss(student, batch)[0].detach()) == pytest.approx(sum(alone), rel=1e-6)
    # held-out data are judged by the task alone, and without its weight
    assert whole.judge.kind == "lm"
    assert torch.equal(
        whole.scores(student, batch).nan_to_num(), Losses(objectives("lm")).scores(student, batch).nan_to_num()
    )
    assert Losses(objectives("hidden", "distill")).judge.kind == "hidden"
    assert Losses(objectives("distill", "mlm")).judge.kind == "mlm"


@pytest.mark.parametrize("kind", ["distill", "hidden", "embedding"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_model_is_at_no_distance_from_itself(models, name, kind):
    teacher, student = models[name]
    losses = Losses(objectives(kind), teacher, centred=True)
    batch = batch_of()
    assert abs(float(losses.loss(copy.deepcopy(teacher), batch)[0].detach())) < 1e-6  # 6e-8
    assert float(losses.loss(student, batch)[0].detach()) > 1e-4


@pytest.mark.parametrize("kind", ["distill", "hidden", "embedding"])
def test_the_student_gets_gradients_and_the_teacher_none(models, kind):
    teacher, student = (copy.deepcopy(model) for model in models["gpt2"])
    losses = Losses(objectives(kind), teacher)
    losses.loss(student, batch_of())[0].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    touched = [n for n, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(touched) == len(list(student.parameters()))
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("kind", ["lm", "distill", "hidden", "embedding"])
def test_padding_takes_no_part(models, kind):
    teacher, student = models["gpt2" if kind in ("lm", "distill") else "encoder"]
    losses = Losses(objectives(kind), teacher)
    batch = batch_of()
    other = copy.deepcopy(batch)
    other["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 42)
    longer = {key: F.pad(value, (0, 4)) for key, value in batch.items()}
    loss = float(losses.loss(student, batch)[0].detach())
    assert loss > 1e-4
    for padded in (other, longer):
        assert float(losses.loss(student, padded)[0].detach()) == pytest.approx(loss, rel=1e-5)  # 4e-7
    rows = [{key: value[i : i + 1, :n] for key, value in batch.items()} for i, n in enumerate([9, 5, 3])]
    scores = torch.cat([losses.scores(student, row).flatten() for row in rows])
    whole = losses.scores(student, batch).flatten()
    kept = torch.sort(whole[whole.isfinite()]).values
    torch.testing.assert_close(kept, torch.sort(scores).values, rtol=1e-4, atol=1e-6)


def test_no_objective_for_a_model_without_what_it_reads(models):
    encoder, _ = models["encoder"]
    for kind in ("lm", "distill"):
        with pytest.raises(RecipeError, match="on logits, and the model gives last_hidden_state.*with a head"):
            Losses(objectives(kind), encoder).loss(encoder, batch_of())
