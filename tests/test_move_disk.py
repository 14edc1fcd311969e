"""A calibrated move in a folder: loaded, run, trained and saved by a process that cannot import normswap."""

import json
from pathlib import Path

import fresh
import normswap

TOKENS = 1024
SCRIPT = """
import json, sys, tempfile
sys.modules["normswap"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
source, out, text, r = sys.argv[1], sys.argv[2], sys.argv[3], {}
load = dict(attn_implementation="eager", dtype=torch.float32, trust_remote_code=True)
ids = torch.tensor([AutoTokenizer.from_pretrained(source)(text)["input_ids"]])
original = AutoModelForCausalLM.from_pretrained(source, **load)
model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, **load)
r["loading"] = sorted(key for key, found in report.items() if found)
with torch.no_grad():
    a, b = (m(input_ids=ids).logits.log_softmax(-1).double() for m in (original, model))
    r["kl"] = float((a.exp() * (a - b)).sum(-1).mean())
    r["top1"] = float((a.argmax(-1) == b.argmax(-1)).double().mean())
options = dict(max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)
cached, plain = (model.generate(ids[:, :16], use_cache=use, **options) for use in (True, False))
r["generated"], r["same"] = cached.shape[1], bool(torch.equal(cached, plain))
step = torch.optim.SGD(model.parameters(), 1e-3)
for name in ("before", "after"):
    loss = model(input_ids=ids, labels=ids).loss
    r[name] = loss.item()
    step.zero_grad()
    loss.backward()
    r["without gradient"] = sorted(n for n, p in model.named_parameters() if p.grad is None)
    step.step()
again = tempfile.mkdtemp()
model.save_pretrained(again)
saved = AutoModelForCausalLM.from_pretrained(again, **load)
with torch.no_grad():
    r["saved"] = bool(torch.equal(saved(input_ids=ids).logits, model(input_ids=ids).logits))
print(json.dumps(r))
"""
TEXT = "Now is the winter of our discontent made glorious summer by this sun of York; and all the clouds that lowered"


def test_a_process_without_normswap_loads_generates_trains_and_saves(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("normswap.calibration.data.COST_TOKENS", 256)  # for the sake of time: what each layer costs
    source = checkpoints / "gpt2-shakespeare"
    moved = normswap.convert(source, tmp_path / "out", placement="post", tokens=TOKENS, verify="fast")
    assert moved.plan.claim == "calibrated" and len(moved.plan.moved) == 12
    found = json.loads(fresh.run(SCRIPT, source, moved.folder, TEXT))
    assert found["loading"] == [] and found["without gradient"] == []
    assert 0 < found["kl"] < 0.01 and found["top1"] > 0.8  # measured, 43 tokens: 0.0028 and 0.93
    assert found["same"] and found["generated"] == 40
    assert found["after"] < found["before"] - 0.01 and found["saved"]  # measured: 4.185 and 4.149


def test_a_conversion_gives_the_same_files_twice(small, tmp_path):
    folders = [
        normswap.convert(small["gpt2"], tmp_path / name / "out", placement="post", tokens=256, verify="fast")
        for name in ("first", "second")
    ]
    first, second = (conversion.folder for conversion in folders)
    names = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert names == {path.relative_to(second) for path in second.rglob("*") if path.is_file()}
    assert {
        Path("model.safetensors"),
        Path("modeling_normswap.py"),
        Path("config.json"),
        Path("normswap.json"),
    } <= names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert folders[0].plan.model_dump() == folders[1].plan.model_dump() and folders[0].plan.claim == "calibrated"
    assert len(folders[0].plan.moved) == 4
