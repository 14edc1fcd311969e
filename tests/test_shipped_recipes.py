"""Every recipe that ships validates, runs on a tiny budget, and a process without normswap loads what it makes."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import fresh
import normswap
from normswap.apply.modelling import load_generated
from normswap.tune.recipe import Recipe
from normswap.tune.shipped import shipped
from normswap.verification.text import calibration_text

WANTED = {
    "layernorm-to-rmsnorm", "rmsnorm-to-layernorm", "pre-to-post", "post-to-pre", "to-sandwich", "to-repbn", "to-dyt",
    "remove-norms", "add-qk-norm", "kernels-only",
}  # fmt: skip
TINY = (
    "data.block=32", "data.held_out_blocks=2", "data.calibration_tokens=256", "stages.0.tokens=256", "verify=fast",
    "training.per_device_train_batch_size=4", "guards={loss: null, tail: null}",
)  # fmt: skip
# of a norm that was there and is not any more, and the other way round
MADE = {
    "layernorm-to-rmsnorm": {"rmsnorm"},
    "rmsnorm-to-layernorm": {"layernorm"},
    "pre-to-post": {"layernorm"},
    "post-to-pre": {"layernorm"},
    "to-sandwich": {"layernorm"},
    "to-repbn": set(),
    "to-dyt": {"dyt"},
    "remove-norms": {"none"},
    "add-qk-norm": {"layernorm", "rmsnorm"},
    "kernels-only": {"layernorm"},
}
LOADS = """
import json, sys, torch
sys.modules["normswap"] = None
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    output = model(input_ids=torch.arange(40, 72)[None])[0]
print(json.dumps(output.flatten()[:64].tolist()))
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A small random BERT with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("bert")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    text = calibration_text().read_text("utf-8")[:20000].splitlines()
    made.train_from_iterator(text, trainers.WordPieceTrainer(vocab_size=200, special_tokens=list(names.values())))
    ends = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_all_that_is_promised_ships():
    assert set(shipped()) == WANTED


@pytest.mark.parametrize("name", sorted(WANTED))
def test_it_validates_and_says_what_it_is_for(name):
    text = shipped()[name].read_text("utf-8")
    assert Recipe.of(name).request() is not None
    assert re.match(r"# .{20,}", text), "the first line says what the recipe is for"


@pytest.mark.parametrize("name", sorted(WANTED))
def test_it_runs_and_the_result_is_all_there(tmp_path, small, bert, name):
    source = {"rmsnorm-to-layernorm": small["llama"], "post-to-pre": bert}.get(name, small["gpt2"])
    more = ("kernels=cpu",) if name == "kernels-only" else ()  # auto compiles some for half a minute
    recipe = Recipe.of(name, (*TINY, *more, f"model={source}", f"output={tmp_path / name}"))
    kept = "normswap.json" if recipe.surgery else "training.json"
    done = normswap.finetune(recipe)
    assert {"source", "start", "healed"} <= done.scores.keys()
    assert all(value == value for scores in done.scores.values() for value in scores.values())
    files = {path.name for path in done.folder.iterdir()}
    assert {"config.json", "model.safetensors", kept, "recipe.yaml", "training.png", "README.md"} <= files
    assert not done.folder.with_name(f"{name}.training").exists()
    record = json.loads((done.folder / kept).read_text())
    assert record["training"]["scores"]["healed"] == done.scores["healed"]
    shared = Recipe.of(done.folder / "recipe.yaml")
    assert shared == done.recipe.without_folders(Path(source).name)
    # of the user's folders nothing is written
    texts = [path.read_text("utf-8") for path in done.folder.iterdir() if path.suffix in (".json", ".yaml", ".md")]
    assert len(texts) > 4 and not any(str(folder) in text for text in texts for folder in (tmp_path, source))
    if done.folded is not None:
        assert done.folded < 1e-5  # measured: 3e-7
    # scaffolding is gone
    names = load_file(done.folder / "model.safetensors").keys()
    assert not [n for n in names if n.endswith((".ramp", ".gate", ".log_scale")) or ".old." in n or "bn_" in n]
    kinds = {site.spec.kind for site in normswap.inspect(done.folder).sites.values()}
    assert MADE[name] <= kinds
    if name in ("to-repbn", "to-dyt", "remove-norms", "layernorm-to-rmsnorm"):
        assert "layernorm" not in kinds
    model = (normswap.load(done.folder) if recipe.surgery else GPT2LMHeadModel.from_pretrained(done.folder)).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.arange(40, 72)[None])[0].flatten()[:64]
    for found in [_by_its_own_code(done.folder)] + ([_elsewhere(done.folder)] if name == "to-repbn" else []):
        assert (found - expected).norm() / expected.norm() < 1e-6  # measured: 0


@torch.no_grad()
def _by_its_own_code(folder: Path) -> torch.Tensor:
    own = (folder / "modeling_normswap.py").exists()
    cls = load_generated(folder) if own else GPT2LMHeadModel
    return cls.from_pretrained(folder).eval()(input_ids=torch.arange(40, 72)[None])[0].flatten()[:64]


def _elsewhere(folder: Path) -> torch.Tensor:
    """In a process that has no normswap."""
    return torch.tensor(json.loads(fresh.run(LOADS, folder)))
