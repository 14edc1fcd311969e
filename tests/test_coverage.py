"""The sweep over all of transformers, on a spread of types: each is inspected, converted in every way and measured."""

import json

import pytest
from click.testing import CliRunner

import coverage
import worker_tasks
from sweep import workers
from sweep.examine import examine
from sweep.table import summary, summary_lines, table_lines

# type -> how many sites, at the least, become RMSNorms exactly, and how many are folded
SPREAD = {
    **dict.fromkeys("gpt2 gpt_neox gptj opt bloom falcon phi cohere codegen starcoder2 stablelm".split(), (3, 1)),
    **dict.fromkeys("gpt_bigcode gpt_neo biogpt ctrl xglm mpt persimmon".split(), (3, 1)),
    **dict.fromkeys("llama mistral gemma gemma2 olmo2 qwen3 mixtral phimoe jamba mamba granite glm4".split(), (0, 1)),
    **dict.fromkeys("t5 mbart whisper blenderbot pegasus".split(), (0, 1)),
    "bart": (0, 0),  # its only gain with linear readers goes to a tied table as well
    **dict.fromkeys("bert roberta deberta-v2 modernbert electra layoutlm".split(), (0, 1)),
    **dict.fromkeys("vit deit dinov2 siglip_vision_model swin convnext segformer clip".split(), (0, 1)),
}


@pytest.mark.parametrize("model_type", SPREAD)
def test_spread(model_type):
    record = examine(model_type)
    assert record["status"] == "inspected", record["why"]
    assert record["audit"] == [] and record["sites"]
    bad = {words: found for words, found in record["conversions"].items() if "why" in found}
    assert not bad  # wrong, unstable or crashed
    for words, at_least in zip(("--norm rmsnorm", "--fold"), SPREAD[model_type], strict=True):
        found = record["conversions"][words]
        converted = set(found.get("converted", [])) - set(found.get("refused", {}))
        assert len(converted) >= at_least
        if converted:
            assert found["result"] == "exact" and found["error"] <= 1e-10  # 1e-12 is the largest measured
            assert found["not_run"] == []
        assert all(why and pattern for why, pattern in found.get("refused", {}).values())


def test_no_task_hangs_or_kills_the_others():
    tasks = ["first", "dies", "hangs", "raises", "grows", "last"]
    found = {}
    for task, result, why in workers.run_all(worker_tasks.task, tasks, (0.0,), 2, 2.0, 8.0):
        found[task] = result or why
    assert found.keys() == set(tasks)
    assert found["first"] == "first done" and found["last"] == "last done"
    assert "exit code 3" in found["dies"] and "more than 2 s" in found["hangs"]
    assert found["raises"] == "ValueError: no" and "MemoryError" in found["grows"]


_REFUSED = {"last": ["h: the stream itself is an output of the model", "_: the stream"], "q": ["why", "why"]}


def _record(model_type: str, **changes) -> dict:
    site = {
        "path": "ln",
        "kind": "layernorm",
        "gain": "w",
        "bias": "bias",
        "role": "stream",
        "stream": "h",
        "linear": True,
    }
    record = {
        "type": model_type, "class": "C", "status": "inspected", "seconds": {}, "audit": [], "loose": {},
        "sites": [site, {**site, "path": "last", "role": "final"}, {**site, "path": "q", "role": "qk", "stream": None}],
        "streams": [{"name": "h", "width": 8, "placements": ["pre"], "pre": True}],
        "conversions": {
            "--norm rmsnorm": {"result": "exact", "error": 1e-15, "converted": ["ln"], "refused": _REFUSED},
        },
    }  # fmt: skip
    return record | changes


def test_summary_counts_what_was_measured_only():
    wrong = _record("b")
    wrong["conversions"] = {"--norm rmsnorm": {**wrong["conversions"]["--norm rmsnorm"], "result": "WRONG", "why": "x"}}
    post = _record("c", streams=[{"name": "h", "width": 8, "placements": ["post"], "pre": False}])
    records = [_record("a"), wrong, post, {"type": "d", "status": "missing", "why": "no default"},
               {"type": "e", "class": "E", "status": "crashed", "why": "boom | bang"}]  # fmt: skip
    found = summary(records)
    assert (found["types"], found["built"], found["inspected"]) == (5, 4, 3)
    groups = found["conversions"]["--norm rmsnorm"]["groups"]
    assert groups["all"] == {"sites": 9, "converted": 2}  # of the wrong conversion nothing counts
    assert groups["pre"] == {"sites": 4, "converted": 1}
    assert groups["output"]["sites"] == 2
    assert {(bad["type"], bad["result"]) for bad in found["bad"]} == {("b", "WRONG"), ("e", "crashed")}
    assert "3 of them (75.0%)" in summary_lines(found)[0]
    table = table_lines(records)
    width = table[0].count("|")
    assert all(line.count("|") == width for line in table if line.startswith("|"))
    assert any("exact 1 of 3, 1e-15; 1 R1; 1 R2" in line for line in table)


def test_the_command_resumes_and_prints(tmp_path):
    out, table = tmp_path / "records.jsonl", tmp_path / "table.md"
    arguments = ["--out", str(out), "--only", "gpt2,lla[m]a", "--jobs", "1", "--table", str(table), "--json"]
    from sweep.examine import versions

    done = _record("llama") | {"key": versions() | {"disk": False}, "class": "FromBefore"}
    stale = _record("gpt2") | {"key": {**done["key"], "torch": "1.0"}}
    out.write_text(f"{json.dumps(stale)}\n{json.dumps(done)}\n{{cut off")
    found = CliRunner().invoke(coverage.main, arguments)
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["types"] == 2
    assert "FromBefore" in table.read_text() and "GPT2LMHeadModel" in table.read_text()
    lines = out.read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[-1])["type"] == "gpt2"  # one type was examined
    assert CliRunner().invoke(coverage.main, [*arguments[:-1], "--only", "no-such"]).exit_code == 2
