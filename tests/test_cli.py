"""The command line as a user meets it: what is printed where, every refusal, and the installed program."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

import normswap
from normswap.cli import main

GPT2, NEOX, LLAMA = "gpt2-shakespeare", "gpt_neox-shakespeare", "llama-shakespeare"


def run(*args: object) -> Result:
    """One command line in this process. What is no ordinary exit is raised."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def out(tmp_path_factory, checkpoints) -> Path:
    """The GPT-2 checkpoint, converted on the command line."""
    folder = tmp_path_factory.mktemp("cli") / "out"
    done = run("convert", checkpoints / GPT2, folder, "--norm", "rmsnorm", "--verify", "fast")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == f"published {folder}\n"
    assert "claim: exact" in done.stdout and "No difference beyond rounding in the output and in what" in done.stdout
    assert "The files hold this result bit for bit: 77 tensors" in done.stdout
    return folder


# ---- help


@pytest.mark.parametrize("command", ["inspect", "plan", "convert", "verify"])
def test_help_shows_an_example(command):
    shown = run(command, "--help")
    assert shown.exit_code == 0
    assert re.search(rf"^  normswap {command} \./\S+", shown.stdout, re.M)
    assert command in run("--help").stdout
    for option in ("--trust-remote-code", "--json"):
        assert option in shown.stdout


@pytest.mark.parametrize(
    "line",
    ["melt x", "convert", "convert a", "convert a b --tied perhaps", "inspect a --nosuch", "verify a b --tokens 1"],
)
def test_usage_errors_exit_with_2(line):
    refused = run(*line.split())
    assert refused.exit_code == 2 and refused.stdout == ""
    assert refused.stderr.startswith("Usage: ") and "Error: " in refused.stderr


# ---- results


def test_inspect_shows_streams_blocks_and_sites(checkpoints):
    shown = run("inspect", checkpoints / GPT2)
    assert shown.exit_code == 0 and shown.stderr == ""
    assert "GPT2LMHeadModel: 13 layernorm; 1 stream" in shown.stdout
    assert "stream transformer.h, width 160" in shown.stdout
    assert re.search(r"transformer\.h\.0-5 +pre +ln_1 / - / - +1, 1", shown.stdout)
    assert re.search(
        r"transformer\.h\.0-5\.ln_1 +layernorm +w +yes +1e-05 +-1 +160 +stream +attn\.c_attn.\[0\]", shown.stdout
    )
    assert re.search(r"transformer\.ln_f +layernorm +w +yes +1e-05 +-1 +160 +final +wte.\[1\]", shown.stdout)
    assert "tied: lm_head.weight = transformer.wte.weight" in shown.stdout


def test_inspect_json_gives_all_of_it(checkpoints):
    shown = run("inspect", checkpoints / NEOX, "--json")
    assert shown.stderr == ""
    found = json.loads(shown.stdout)
    assert found["architecture"] == "GPTNeoXForCausalLM" and found["converted"] is None
    assert len(found["sites"]) == 13 and len(found["streams"]) == 1
    assert {"path", "kind", "gain", "bias", "eps", "axes", "role", "readers"} <= found["sites"][0].keys()
    stream = found["streams"][0]
    assert len(stream["blocks"]) == 6 and {block["placement"] for block in stream["blocks"]} == {"pre, parallel"}
    assert len(stream["writers"]) == 25 and {"name", "axis"} <= stream["writers"][0].keys()


def test_plan_shows_what_would_be_done_and_writes_nothing(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run("plan", checkpoints / GPT2, "--norm", "rmsnorm", "--fold", "--tied", "untie")
    assert shown.exit_code == 0 and shown.stderr == "" and not list(tmp_path.iterdir())
    assert "claim: exact" in shown.stdout and "26 writers of the stream are centred" in shown.stdout
    for row in (
        r"untie +lm_head\.weight +transformer\.wte\.weight as it is +1",
        r"fold_gain +transformer\.h\.0-5\.attn\.c_attn\.weight +ln_1\.weight \(w\), axis 0 +6",
        r"centre +transformer\.h\.0-5\.mlp\.c_proj\.bias +axis 0 +6",
        r"swap_norm +transformer\.ln_f +rmsnorm, gain none, no bias, eps 1e-05, casting float32 +1",
    ):
        assert re.search(row, shown.stdout), row
    assert "on disk: 50 edited, 26 removed, 2 added; 7.86 MiB -> 8.47 MiB" in shown.stdout
    assert "164,864 parameters added, 4,160 removed; untied: lm_head.weight" in shown.stdout


def test_a_saved_plan_can_be_run(checkpoints, tmp_path, out):
    path = tmp_path / "plan.json"
    shown = run("plan", checkpoints / GPT2, "--norm", "rmsnorm", "-o", path, "--json")
    assert shown.exit_code == 0 and shown.stderr == f"saved {path}\n"
    found = json.loads(shown.stdout)
    assert found["plan"] == json.loads(path.read_text())
    assert found["disk"]["tensors"] == {"copied": 51, "edited": 25} and found["disk"]["untied"] == []
    done = run("convert", checkpoints / GPT2, tmp_path / "out", "--plan", path, "--verify", "none", "--json")
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert result["folder"] == str(tmp_path / "out") and result["report"]["mode"] == "none"
    assert "NOT VERIFIED: the result was published without being measured" in done.stderr
    again, first = (json.loads((f / "normswap.json").read_text())["files"] for f in (tmp_path / "out", out))
    assert again == first


def test_not_verified_is_said_on_both_streams(checkpoints, tmp_path):
    done = run("convert", checkpoints / LLAMA, tmp_path / "out", "--fold", "--verify", "none")
    assert done.exit_code == 0
    assert "NOT VERIFIED: nothing was measured (--verify none)." in done.stdout
    assert done.stderr.startswith("NOT VERIFIED: ") and done.stderr.endswith(f"published {tmp_path / 'out'}\n")


def test_partial_lists_what_stays(checkpoints):
    request = ("plan", checkpoints / GPT2, "--fold")
    refused = run(*request)
    assert refused.exit_code == 2 and refused.stdout == ""
    assert "transformer.ln_f: its reader transformer.wte.weight in lm_head is used in" in refused.stderr
    assert "--tied untie" in refused.stderr and "--partial" in refused.stderr
    shown = run(*request, "--partial")
    assert shown.exit_code == 0 and re.search(r"1 sites? stays? as", shown.stdout), shown.stdout
    assert "transformer.ln_f: its reader" in shown.stdout


def test_verify_finds_no_difference_in_a_conversion(checkpoints, out):
    shown = run("verify", checkpoints / GPT2, out, "--tokens", 512)
    assert shown.exit_code == 0 and shown.stderr == ""
    header = re.search(r" mean +median +p99 +p99\.9 +worst +at", shown.stdout)
    assert header
    for row in ("relative error", r"KL \(nats\)", "cross-entropy A", "cross-entropy B", "its change"):
        # five numbers and the token where it is worst
        assert re.search(rf"{row}( +[\d.e+-]+){{5}} +.*‹.+›", shown.stdout), row
    assert re.search(r"same top-1 +100\.00%", shown.stdout)
    assert "No difference beyond rounding in the output and in what reaches 13 norms" in shown.stdout


def test_verify_names_the_first_site_where_two_models_part(checkpoints, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(checkpoints / GPT2, other)
    weights = load_file(other / "model.safetensors")
    weights["transformer.h.3.mlp.c_proj.weight"] *= 1.01
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    shown = run("verify", checkpoints / GPT2, other, "--tokens", 256)
    assert shown.exit_code == 0
    assert (
        "The two differ, first in what reaches transformer.h.4.ln_1: the output's worst row is off by" in shown.stdout
    )
    found = json.loads(run("verify", checkpoints / GPT2, other, "--tokens", 256, "--json").stdout)
    assert found["comparison"]["first_divergence"] == "transformer.h.4.ln_1"
    assert "The two differ" in run("verify", checkpoints / GPT2, checkpoints / LLAMA, "--tokens", 256).stdout


def test_a_converted_folder_is_recognised(out, tmp_path):
    assert "converted by normswap 0.1.0: --norm rmsnorm at 13 sites (exact)" in run("inspect", out).stdout
    for request in (("plan", out), ("convert", out, tmp_path / "again")):
        refused = run(*request, "--norm", "rmsnorm")
        assert refused.exit_code == 2 and "it is not converted twice" in refused.stderr
    assert not list(tmp_path.iterdir())


# ---- refusals


def copy_of(folder: Path, name: str, **config) -> Path:
    shutil.copytree(folder, name)
    path = Path(name) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return Path(name)


def bert(gpt2, to):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=99)
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(to)


def no_bin(gpt2, to):
    (copy_of(gpt2, to) / "model.safetensors").rename(to / "pytorch_model.bin")


def cut_short(gpt2, to):
    path = copy_of(gpt2, to) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def without_config(gpt2, to):
    (copy_of(gpt2, to) / "config.json").unlink()


def config_text(data: bytes):
    def make(gpt2, to):
        to.mkdir()
        (to / "config.json").write_bytes(data)

    return make


def changed(**config):
    return lambda gpt2, to: copy_of(gpt2, to, **config)


# what -> (how the folder is made, what the message says)
BAD_FOLDERS = {
    "post-norm": (bert, "cannot be met at 5 of 6 sites"),
    "quantised": (changed(quantization_config={"quant_method": "gptq"}), r"is quantised \(gptq\)"),
    "empty": (lambda gpt2, to: to.mkdir(), "has no config.json"),
    "missing": (lambda gpt2, to: None, "is no folder"),
    "a file": (lambda gpt2, to: to.write_text("{}"), "is no folder"),
    "no config": (without_config, "has no config.json"),
    "broken JSON": (config_text(b'{"model_type": '), "cannot be read as JSON"),
    "no UTF-8": (config_text(b"\xff\xfe\x00"), "cannot be read as JSON"),
    "a list": (config_text(b"[1]"), "holds a list; expected a JSON object"),
    "an empty object": (config_text(b"{}"), "cannot be loaded"),
    "unknown type": (changed(model_type="gpt9"), "model type `gpt9`"),
    "unknown class": (changed(architectures=["GPT9Model"]), "is a GPT9Model, which cannot be built"),
    "no class": (changed(architectures=None), "names no model class"),
    "no number": (changed(n_layer="six"), "'n_layer' expected int, got str"),
    "a negative number": (changed(n_embd=-5), "cannot be built from the configuration"),
    "another width": (changed(n_embd=80), "config.json is not of these weights"),
    "more layers": (changed(n_layer=7), "does not hold all weights"),
    "fewer layers": (changed(n_layer=5), "layers that its configuration does not have"),
    "no .bin": (no_bin, "pytorch_model.bin: expected a state dict that torch.save wrote: it does not begin as one"),
    "cut short": (cut_short, "It is damaged; fetch the file again"),
    "code": (
        changed(model_type="evil", auto_map={"AutoConfig": "modeling_evil.EvilConfig"}),
        "add --trust-remote-code",
    ),
    "hostile": (changed(model_type="gpt\x1b[31m\x07\x1b]0;owned\x07\u202e2"), r"gpt\?\[31m\?\?\]0;owned\?\?2"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_wrong_folders_are_refused_with_one_clear_message(checkpoints, tmp_path, name):
    make, message = BAD_FOLDERS[name]
    make(checkpoints / GPT2, tmp_path / "model")
    if name == "code":
        (tmp_path / "model" / "modeling_evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    before = sorted(tmp_path.rglob("*"))
    refused = run("convert", tmp_path / "model", tmp_path / "out", "--norm", "rmsnorm")
    assert refused.exit_code == 2 and refused.stdout == ""
    assert re.match("(Error|Refused): ", refused.stderr) and re.search(message, refused.stderr), refused.stderr
    assert refused.stderr.count("\n") == 1 or name == "post-norm"  # that one lists the sites
    assert "Traceback" not in refused.stderr
    assert all(c == "\n" or c.isprintable() for c in refused.stderr)
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path / "sprung").exists()


BAD_REQUESTS = {
    "nothing": (GPT2, (), "nothing is asked for"),
    "unknown norm": (GPT2, ("--norm", "batchnorm"), "norm 'batchnorm' is not offered: expected one of affine, "),
    "unknown dtype": (GPT2, ("--norm", "rmsnorm", "--dtype", "int4"), "dtype 'int4' is not offered: expected one of"),
    "RMSNorm again": (LLAMA, ("--norm", "rmsnorm"), "its 13 norms are rmsnorm"),
    "tied head": (GPT2, ("--norm", "rmsnorm", "--fold"), "untie them with --tied untie"),
    "no text": (GPT2, ("--norm", "rmsnorm", "--text", "nosuch.txt"), "nosuch.txt cannot be read"),
    "no plan": (GPT2, ("--plan", "nosuch.json"), "cannot read the plan nosuch.json"),
    "two plans": (GPT2, ("--plan", "nosuch.json", "--fold"), "a saved plan already says what to do"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_requests_that_cannot_be_met_are_refused(checkpoints, tmp_path, name):
    source, options, message = BAD_REQUESTS[name]
    refused = run("convert", checkpoints / source, tmp_path / "out", *options)
    assert refused.exit_code == 2 and refused.stdout == ""
    assert message in refused.stderr and "Traceback" not in refused.stderr
    assert not list(tmp_path.iterdir())


def test_each_command_refuses(checkpoints, tmp_path):
    (tmp_path / "empty").mkdir()
    for args in (
        ("inspect", tmp_path / "empty"),
        ("plan", tmp_path / "empty", "--norm", "rmsnorm"),
        ("verify", checkpoints / GPT2, tmp_path / "empty"),
        ("verify", checkpoints / GPT2, checkpoints / GPT2, "--device", "toaster"),
        ("verify", checkpoints / GPT2, checkpoints / GPT2, "--dtype", "int4"),
        ("plan", checkpoints / GPT2, "--norm", "rmsnorm", "-o", tmp_path / "no" / "plan.json"),
        ("inspect", "nobody/no-such-model"),
    ):
        refused = run(*args)
        assert refused.exit_code == 2 and refused.stdout == "" and refused.stderr.startswith("Error: "), args
        assert refused.stderr.count("\n") == 1, refused.stderr


def test_a_hub_id_without_a_network_is_a_clear_error():
    refused = run("inspect", "nobody/no-such-model")
    assert "nobody/no-such-model is no local folder and could not be had from the Hub" in refused.stderr


def test_a_destination_is_not_written_over(checkpoints, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    refused = run("convert", checkpoints / GPT2, tmp_path, "--norm", "rmsnorm")
    assert refused.exit_code == 2 and "exists" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_hostile_names_do_not_reach_the_terminal(checkpoints, tmp_path):
    source = copy_of(checkpoints / GPT2, tmp_path / "source")
    (source / "[bold]\x1b[2J.bin").write_bytes(b"")
    done = run("convert", source, tmp_path / "out", "--norm", "rmsnorm", "--verify", "none")
    assert done.exit_code == 0 and "[bold]?[2J.bin" in done.stderr and "\x1b" not in done.output
    record = json.loads((tmp_path / "out" / "normswap.json").read_text())
    record["normswap"] = "\x1b[31m9"
    (tmp_path / "out" / "normswap.json").write_text(json.dumps(record))
    shown = run("inspect", tmp_path / "out")
    assert "converted by normswap ?[31m9" in shown.stdout and "\x1b" not in shown.output


def test_code_in_a_checkpoint_runs_with_the_flag_only(checkpoints, tmp_path):
    trap, source = tmp_path / "sprung", tmp_path / "source"
    copy_of(
        checkpoints / GPT2,
        source,
        model_type="evil",
        architectures=["EvilForCausalLM"],
        auto_map={"AutoConfig": "modeling_evil.EvilConfig", "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"},
    )
    (source / "modeling_evil.py").write_text(
        f"open({str(trap)!r}, 'w')\nfrom transformers import GPT2Config, GPT2LMHeadModel\n"
        "class EvilConfig(GPT2Config):\n    model_type = 'evil'\n"
        "class EvilForCausalLM(GPT2LMHeadModel):\n    config_class = EvilConfig\n"
    )
    for args in (("inspect", source), ("plan", source, "--norm", "rmsnorm"), ("verify", source, source)):
        assert run(*args).exit_code == 2
    assert not trap.exists()
    shown = run("inspect", source, "--trust-remote-code")
    assert trap.exists() and "EvilForCausalLM: 13 layernorm" in shown.stdout
    refused = run("convert", source, tmp_path / "out", "--norm", "rmsnorm", "--trust-remote-code")
    assert refused.exit_code == 2 and "convert a checkpoint of a model that transformers has" in refused.stderr
    assert not (tmp_path / "out").exists()


# ---- the program


def program(*args: object, **options) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_HUB_DISABLE", "TRANSFORMERS_"))}
    return subprocess.run(
        [str(arg) for arg in args],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        **options,
    )


def test_the_program_prints_results_and_nothing_of_other_libraries(checkpoints, tmp_path):
    done = program(
        sys.executable, "-m", "normswap", "convert", checkpoints / NEOX, "out", "--norm", "rmsnorm", "--verify", "fast",
        "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "published out\n"
    assert json.loads(done.stdout)["report"]["mathematics"]["comparison"]["first_divergence"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_console_script(tmp_path):
    script = Path(sys.executable).with_name("normswap")
    command = [script] if script.exists() else [sys.executable, "-m", "normswap"]
    done = program(*command, "inspect", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr
        == f"Error: {tmp_path} has no config.json: expected a folder saved by `save_pretrained`, or a Hub id.\n"
    )
    assert program(*command, "--version").stdout == f"normswap, version {normswap.__version__}\n"


def test_help_does_not_import_torch():
    code = "import sys\nfrom normswap.cli import main\nmain(['plan', '-h'], standalone_mode=False)"
    code += "\nprint('torch' in sys.modules)"
    done = program(sys.executable, "-c", code)
    assert done.stdout.startswith("Usage: ") and done.stdout.endswith("\nFalse\n"), done.stderr


def test_the_program_ends_at_once_and_loses_nothing():
    """What was printed and what was to happen at the end is there, as if Python had taken everything apart."""
    script = (
        "import atexit, sys; from normswap.cli.process import run\n"
        "atexit.register(print, 'registered', flush=False)\n"
        "sys.argv = ['normswap', *sys.argv[1:]]; run()"
    )
    for words, code in ((["norms"], 0), (["norms", "--nonsense"], 2)):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        assert done.stdout.endswith("registered\n") and ("layernorm" in done.stdout) == (code == 0)
        assert "Traceback" not in done.stderr


def test_a_reader_that_stops_early_is_told_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "normswap", "norms"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
