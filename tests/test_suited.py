"""Objectives that mean nothing for a model are refused before anything is calibrated or trained."""

import pytest
import torch
from datasets import Dataset
from transformers import BertForSequenceClassification, BertModel, default_data_collator

from models import CAUSAL, tiny, tiny_config
from normswap.errors import RecipeError
from normswap.tune.data import Corpus
from normswap.tune.recipe import Recipe
from normswap.tune.suited import check_suited
from sweep.zoo import randomise


def check(model, objective, **columns) -> None:
    recipe = {"model": "m", "output": "o", "stages": [{"steps": 1, "learning_rate": 1e-3}], "objective": objective}
    recipe = Recipe.of(recipe | {"data": {"label": "y", "pack": False}})
    ids = torch.randint(3, 99, (3, 12), generator=torch.Generator().manual_seed(4)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 12] * 3} | columns)
    collate = default_data_collator
    check_suited(model, recipe.objective, Corpus(rows, rows, collate, collate, "ids", "ids"))


def bert(cls, **options):
    torch.manual_seed(0)
    return randomise(cls(tiny_config("bert", **options)), 0).eval()


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_causal_models_take_next_tokens(name, dtype):
    check(tiny(name).to(dtype), ["lm", "distill", "hidden"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_model_that_sees_what_it_is_to_predict_is_refused(dtype):
    with pytest.raises(RecipeError, match="objective lm: BertForMaskedLM sees the tokens that it is to predict"):
        check(tiny("bert").to(dtype), "lm")
    check(tiny("bert").to(dtype), "mlm", labels=[[-100, 5] + [-100] * 10] * 3)


@pytest.mark.parametrize(
    "model, objective, message",
    [
        (lambda: tiny("t5"), "lm", "does not run on input_ids, attention_mask alone, which is what recipes train on"),
        (lambda: bert(BertModel), "lm", "the objective is on logits, and the model gives last_hidden_state"),
        (lambda: bert(BertForSequenceClassification), "lm", "objective lm: expected one for each token of the vocab"),
    ],
    ids=["encoder-decoder", "no head", "another head"],
)
def test_models_of_another_task(model, objective, message):
    with pytest.raises(RecipeError, match=message):
        check(model(), objective)


def test_classes_are_those_of_the_head():
    model = bert(BertForSequenceClassification, num_labels=3)
    check(model, "classification", labels=[0, 2, 1])
    for labels, found in (
        ([0, 3, 1], "3"),
        ([0, -1, 1], "-1"),
        (["yes", "no", "yes"], "'no', 'yes'"),
        ([0, 1, None], "None"),
    ):
        with pytest.raises(RecipeError) as refused:
            check(model, "classification", labels=labels)
        assert str(refused.value) == (
            "data.label: BertForSequenceClassification has 3 classes, expected whole numbers from 0 to 2; found "
            f"{found}."
        )
    with pytest.raises(RecipeError, match="objective classification: expected one for each class; GPT2LMHeadModel"):
        check(tiny("gpt2"), "classification", labels=[0, 1, 2])
