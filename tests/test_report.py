"""Reports of folders, comparisons and models: what a page says, that it is one safe file, and the same as JSON."""

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM

import normswap
from models import tiny
from normswap.checkpoint.record import PLAIN, RECORD
from normswap.checkpoint.source import Source
from normswap.cli import main
from normswap.errors import DestinationError, SourceError
from normswap.report.findings.drawing import drawing
from normswap.report.findings.gather import of_folder, of_model
from normswap.report.findings.model import Findings
from normswap.report.metadata import metadata
from normswap.report.page.chart import linear_scale
from normswap.report.page.page import page

BROWSER = next(
    (path for name in ("chromium", "google-chrome", "chromium-browser") if (path := shutil.which(name))), None
)


def run(*args: object) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory) -> dict[str, Path]:
    """Three conversions: an exact one, one that is fitted to little text, and one that nobody measured."""
    root = tmp_path_factory.mktemp("reports")
    normswap.convert(small["gpt2"], root / "exact", norm="rmsnorm")
    normswap.convert(small["gpt2"], root / "moved", placement="post", layers="0", tokens=512, verify="fast")
    normswap.convert(small["gpt2"], root / "unknown", norm="rmsnorm", fold=True, tied="untie", verify="none")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def found(folders) -> dict[str, Findings]:
    return {name: of_folder(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def pages(found) -> dict[str, str]:
    return {name: page(findings) for name, findings in found.items()}


@pytest.fixture(scope="module")
def streams(tmp_path_factory) -> Path:
    """An encoder and a decoder, of which some norms are converted."""
    root = tmp_path_factory.mktemp("streams")
    tiny("bart").save_pretrained(root / "bart")
    normswap.convert(root / "bart", root / "out", norm="rmsnorm", partial=True, verify="fast")
    return root / "out"


class _Checked(HTMLParser):
    """Every tag is closed in its order; what is fetched, and what runs, is noted."""

    VOID = {"meta", "br", "wbr", "hr", "img", "link", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.outside, self.words, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.outside += [v for k, v in attributes if k in ("src", "href", "xlink:href") or k.startswith("on")]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


# -- what the page says ------------------------------------------------------------------------------------------------


def test_pages_are_one_file_each_that_asks_for_nothing(pages):
    assert len(pages) == 3
    for name, text in pages.items():
        checked = _Checked(text)
        assert checked.outside == [] and "script" not in checked.tags and "link" not in checked.tags, name
        assert not re.search(r"https?:|url\(|@import", text), name
        assert checked.tags.count("svg") >= 2 and len(text.encode()) < 2_000_000


def test_an_exact_conversion_says_so_from_the_top(pages):
    text = _Checked(pages["exact"]).text
    for words in (
        "5 of 5 norms changed from LayerNorm to RMSNorm.",
        "The same function",
        "claim: exact",
        "Nothing here speaks against using it.",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        "All 32 tokens are the same.",
        "normswap convert",
        "above this line it is more than rounding",
        "What the norms receive",
        "How it was done",
    ):
        assert words in text, words
    assert text.index("The same function") < text.index("What to do next") < text.index("The norm map")


def test_a_calibrated_one_says_what_it_is_and_what_to_try(pages, found):
    text = _Checked(pages["moved"]).text
    output = found["moved"].main.comparison.output
    assert f"the same in {output.top1:.1%} of all cases" in text and "claim: calibrated" in text
    assert "normswap finetune pre-to-post" in text
    assert "residual blocks moved from pre to post placement (layers 0)" in text
    assert "Behind each moved block" in text and "--verify fast" in text
    assert found["moved"].verdict.level in ("note", "warn", "bad")


def test_what_was_not_measured_is_not_said(pages, found):
    text = _Checked(pages["unknown"]).text
    assert found["unknown"].verdict.level == found["unknown"].advice[0].level == "bad"
    assert "Not verified" in text and "The same function" not in text and "What they write" not in text


def test_costs_are_counted(found, folders):
    sizes = found["unknown"].sizes
    file = folders["unknown"] / "model.safetensors"
    assert sizes.bytes_after == pytest.approx(file.stat().st_size, rel=0.05) and sizes.untied == ("lm_head.weight",)
    model = AutoModelForCausalLM.from_pretrained(folders["exact"], trust_remote_code=True)
    assert found["exact"].sizes.parameters_after == sum(p.numel() for p in model.parameters())
    assert found["exact"].sizes.parameters_before == found["exact"].sizes.parameters_after
    assert 0 < found["exact"].sizes.bytes_rewritten < found["exact"].sizes.bytes_after
    assert not found["exact"].sizes.seconds
    seconds = {"writing": 0.5, "verifying": 240.0}
    words = "It took 4.01 minutes: writing 0.5 seconds, verifying 4 minutes."
    assert words in page(of_folder(folders["exact"], seconds=seconds))


# -- the drawing -------------------------------------------------------------------------------------------------------


def test_the_block_is_drawn_slot_by_slot(found):
    before, after = found["moved"].before.streams[0], found["moved"].after.streams[0]
    assert [(layers.shown, layers.count) for layers in before.layers] == [("layer 0-1", 2)]
    assert [(layers.shown, layers.count) for layers in after.layers] == [("layer 0", 1), ("layer 1", 1)]
    assert [step.name for step in before.layers[0].steps] == ["attn", "mlp"]
    first = after.layers[0].steps[0]
    assert first.placement == "post" and not first.n_in and [norm.name for norm in first.n_out] == ["ln_1"]
    assert [norm.kind for norm in after.embedding] == ["layernorm"] and not before.embedding


def test_the_map_says_where_norms_stood_and_stand(pages, found):
    rows = {row.shown: row for row in found["moved"].sites}
    assert list(rows)[0] == "transformer.h.0.norm_first"  # it runs first, though only the result has it
    assert (rows["transformer.h.0.ln_1"].slot_before, rows["transformer.h.0.ln_1"].slot_after) == ("N_in", "N_out")
    assert _Checked(pages["moved"]).text.count("N_in \u2192 N_out") == 2


def test_what_changed_is_marked_and_nothing_else(pages):
    """Layer 0 has another norm in two slots of two steps, on both sides; layer 1 is as it was."""
    drawn = re.findall(r'<svg[^>]*aria-label="layer [^"]*".*?</svg>', pages["moved"])
    assert [svg.count(" changed") for svg in drawn] == [4, 4, 0, 0]
    assert [svg.count('class="norm') for svg in drawn] == [2, 2, 2, 2]


@pytest.mark.parametrize(("name", "steps"), [("t5", [2, 3]), ("bart", [2, 3]), ("gpt_neox", [1]), ("vit", [2])])
def test_every_stream_is_drawn(name, steps):
    model = tiny(name)
    drawn = drawing(normswap.inspect(model))
    assert [len(stream.layers[0].steps) for stream in drawn.streams] == steps
    assert [sum(layers.count for layers in stream.layers) for stream in drawn.streams] == [2] * len(steps)
    names = [step.name for stream in drawn.streams for step in stream.layers[0].steps]
    assert "branch" not in names and not any(name.isdigit() for name in names)
    assert drawn.parameters == sum(p.numel() for p in model.parameters())
    if name == "gpt_neox":  # two branches of one sum, each behind a norm of its own
        assert len(drawn.streams[0].layers[0].steps[0].n_in) == 2 and set(names[0].split(" + ")) == {"attention", "mlp"}


def test_several_streams_are_told_apart(streams):
    findings = of_folder(streams)
    text = _Checked(page(findings)).text
    assert text.count("Stream model.encoder.layers") == text.count("Stream model.decoder.layers") == 1
    assert len(re.findall("relative error of what reaches each norm of model", page(findings), re.I)) == 2
    # each stream's chart has the norms before its first layer too
    caption = re.search("model.decoder.layers : mean worst token. (.*?) The input", text)[1]
    assert caption.startswith("\u25cf model.decoder.layernorm_embedding") and "encoder.layers" not in caption
    assert "random ids" in text and any("Not all that was asked for" in item.what for item in findings.advice)


# -- safety ------------------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script>\u202egnp.exe\x1b[31m&amp;"


def test_names_and_texts_of_a_checkpoint_cannot_do_anything(folders, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(folders["exact"], folder)
    record = json.loads((folder / RECORD).read_text())
    record["source"]["name"] = record["command"] = HOSTILE
    record["plan"]["reasons"] = [HOSTILE]
    record["report"]["stored"]["text"] = HOSTILE
    for token in record["report"]["stored"]["comparison"]["output"]["worst_tokens"]:
        token |= {"before": HOSTILE, "token": HOSTILE, "chosen_a": HOSTILE, "chosen_b": HOSTILE}
    sample = record["report"]["generation"]["samples"][0]
    sample |= {"prompt": HOSTILE, "same": HOSTILE, "text_a": HOSTILE, "text_b": HOSTILE, "first_difference": 1}
    for site in record["report"]["mathematics"]["comparison"]["sites"]:
        site["site"] = HOSTILE
    (folder / RECORD).write_text(json.dumps(record))
    text = page(of_folder(folder))
    checked = _Checked(text)
    assert "script" not in checked.tags and checked.outside == []
    assert "\u202e" not in text and "\x1b" not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 20
    shown = run("report", folder, "-o", tmp_path / "page.html")
    assert shown.exit_code == 0 and "\x1b" not in shown.stdout and "\u202e" not in shown.stdout


def test_texts_of_the_user_are_in_the_page_and_not_in_the_folder(small, tmp_path):
    secret = "The quick brown fox jumps over the lazy dog of Mister Xylophant.\n"
    (tmp_path / "text.txt").write_text(secret * 40)
    made, shown = tmp_path / "out", tmp_path / "page.html"
    done = run("convert", small["gpt2"], made, "--norm", "rmsnorm", "--text", tmp_path / "text.txt", "--report", shown)
    assert done.exit_code == 0 and f"wrote {shown}" in done.stderr
    fragments = re.compile("ick brown|fox jum|the laz|of Mister")
    assert "It took " in shown.read_text() and fragments.search(_Checked(shown.read_text()).text)
    for path in made.iterdir():
        assert not fragments.search(path.read_bytes().decode("latin-1")), path
    later = _Checked(page(of_folder(made))).text
    assert not fragments.search(later) and "not kept, as it was measured on a text of the user's" in later


# -- records -----------------------------------------------------------------------------------------------------------


def _copied(folder: Path, to: Path, change) -> Path:
    shutil.copytree(folder, to)
    record = json.loads((to / RECORD).read_text())
    change(record)
    (to / RECORD).write_text(json.dumps(record))
    return to


def test_a_folder_of_an_older_version_says_what_was_not_measured(folders, tmp_path):
    def older(record):
        record.pop("written"), record.pop("command"), record["report"].pop("generation")
        for name in ("mathematics", "stored"):
            comparison = record["report"][name]["comparison"]
            comparison.pop("streams"), comparison["output"].pop("worst_tokens")
            for stat in comparison["output"].values():
                if isinstance(stat, dict):
                    stat.pop("p99"), stat.pop("histogram")

    text = _Checked(page(of_folder(_copied(folders["exact"], tmp_path / "old", older)))).text
    assert "The same function" in text
    for words in (
        "The distribution over tokens was not measured",
        "What the norms receive was not measured",
        "The command was not kept",
    ):
        assert words in text


def test_a_source_that_is_not_known_here_has_no_drawing(folders, tmp_path):
    folder = _copied(folders["exact"], tmp_path / "out", lambda r: r["source_config"].update(model_type="nosuch"))
    text = _Checked(page(of_folder(folder))).text
    assert "The same function" in text and "The block" not in text
    assert "The source's norms could not be looked at" in text and "nosuch" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record["report"]["stored"].pop("comparison"),
        lambda record: record.update(written=[1]),
        lambda record: record.update(training={"tokens": 1}),
        lambda record: record.update(adapters=[{"name": "x"}]),
    ],
)
def test_a_damaged_record_is_refused(folders, tmp_path, change):
    with pytest.raises(SourceError, match="the record in .* is damaged"):
        of_folder(_copied(folders["exact"], tmp_path / "out", change))


def test_weights_that_are_others_now_are_found_out(folders, tmp_path):
    shutil.copytree(folders["exact"], tmp_path / "out")
    data = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(data)
    first = of_folder(tmp_path / "out").advice[0]
    assert first.level == "bad" and "model.safetensors: not what was measured" in first.what


def test_a_fine_tune_shows_its_curves_beside_the_control(folders, tmp_path):
    def history(end):
        steps = [{"tokens": 100 * n, "loss": 5 - n / 500, "learning_rate": 1e-3, "stage": "all"} for n in range(900)]
        held_out = [{"tokens": 900 * n, "eval_mean": 5 - end * n / 100, "eval_p99.9": 9.0} for n in range(101)]
        return [*steps, *held_out]

    def trained(record):
        record["report"] = record["report"]["stored"] | {"generation": record["report"]["generation"]}
        scores = {"source": 5.0, "start": 5.2, "healed": 4.2, "control": 4.1}
        record["training"] = {
            "recipe": {"objective": [{"kind": "lm", "weight": 1.0}]},
            "data": "corpus.txt",
            "scores": {name: {"mean": mean, "p99.9": 9.0} for name, mean in scores.items()},
            "tokens": 90000,
            "minutes": 3.5,
            "folded": None,
            "changes": [{"key": "stages.0.learning_rate", "was": 1e-3, "now": 1e-4, "since": {}}],
            "history": {"healed": history(0.8), "control": history(0.9)},
        }

    findings = of_folder(_copied(folders["exact"], tmp_path / "out", trained))
    assert findings.kind == "finetune" and findings.verdict.headline == "Not healed yet"
    curve = findings.training.curves["healed"]["loss"]
    assert 200 <= len(curve) <= 241 and curve[-1] == (89900, pytest.approx(5 - 899 / 500))
    text = page(findings)
    words = _Checked(text).text
    assert "0.1000 above the unconverted model, trained as much" in words and "stages.0.learning_rate" in words
    assert "All 32 tokens are the same." in words
    assert len(re.findall('aria-label="[^"]* over tokens"', text)) == 5  # the distribution, and four that were logged
    assert text.count("the source</text>") == 2 and "control: the source, trained as much" in words


def test_a_training_without_a_conversion_has_a_page(small, folders, tmp_path):
    shutil.copytree(small["gpt2"], tmp_path / "out")
    record = json.loads((folders["exact"] / RECORD).read_text())
    plan = {"request": {}, "reasons": [], "converted": [], "edits": []}
    scores = {name: {"mean": 4.0, "p99.9": 9.0} for name in ("source", "start", "healed")}
    training = {"data": "corpus.txt", "scores": scores, "tokens": 900, "minutes": 1.0, "history": {}}
    kept = {key: record[key] for key in ("normswap", "source", "source_config")}
    kept |= {"plan": record["plan"] | plan, "training": training, "report": record["report"]["stored"]}
    (tmp_path / "out" / PLAIN).write_text(json.dumps(kept))
    words = _Checked(page(of_folder(tmp_path / "out"))).text
    assert "No norm was changed." in words and "Trained on 900 tokens." in words and "As good as the original" in words
    assert "AutoModelForCausalLM.from_pretrained(folder) loads it" in words.replace("folder )", "folder)")


# -- the model card ---------------------------------------------------------------------------------------------


def test_a_card_has_what_the_hub_reads(small, folders, tmp_path):
    card = ModelCard.load(folders["exact"] / "README.md")
    assert "**The same function.** The output and what reaches 5 norms agree to rounding" in card.text
    assert re.search(r"\| KL, nats \(as stored, float32\)( \| [\d.e+-]+){5} \|", card.text)
    assert "from_pretrained(folder, trust_remote_code=True)" in card.text and "normswap report" in card.text
    shutil.copytree(small["gpt2"], tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(
        "---\nlicense: mit\nlanguage: [en, fr]\ntags: [poetry, gguf, normswap]\nmetrics: [secret]\n---\n# It\n"
    )
    source = dataclasses.replace(Source.open(tmp_path / "model"), name="org/model")
    for trained in (False, True):
        kept = ModelCardData(**yaml.safe_load(metadata(source, trained))).to_dict()
        assert kept == {
            "library_name": "transformers",
            "base_model": "org/model",
            "license": "mit",
            "language": ["en", "fr"],
            "tags": ["normswap", "poetry"],
        } | ({"base_model_relation": "finetune"} if trained else {})


# -- the command line --------------------------------------------------------------------------------------------------


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_report_prints_tables_and_writes_a_page_elsewhere(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = _digests(folders["exact"])
    shown = run("report", folders["exact"])
    assert shown.exit_code == 0 and shown.stderr == "wrote exact-report.html\n"
    assert [path.name for path in tmp_path.iterdir()] == ["exact-report.html"] and _digests(folders["exact"]) == before
    assert "The same function." in shown.stdout and "what norms receive" in shown.stdout
    assert re.search(r"transformer\.h\.0-1\.ln_1 +LayerNorm +RMSNorm +2 ", shown.stdout)
    assert "all of 32" in shown.stdout and "the worst tokens" in shown.stdout
    as_json = run("report", folders["exact"], "--json")
    assert as_json.stderr == "" and Findings.model_validate_json(as_json.stdout) == of_folder(folders["exact"])


def test_a_page_is_not_written_where_it_must_not_be(folders, small, tmp_path):
    with pytest.raises(DestinationError, match="outside of it"):
        normswap.write_report(folders["exact"], folders["exact"] / "report.html")
    with pytest.raises(DestinationError, match="no folder"):
        normswap.write_report(folders["exact"], tmp_path / "nowhere" / "report.html")
    refused = run(
        "convert", small["gpt2"], tmp_path / "out", "--norm", "rmsnorm", "--report", tmp_path / "out" / "a.html"
    )
    assert refused.exit_code == 2 and not list(tmp_path.iterdir())
    with pytest.raises(SourceError, match="no normswap.json"):
        of_folder(small["gpt2"])


def test_verify_and_inspect_draw_pages(small, folders, tmp_path):
    done = run("verify", small["gpt2"], folders["exact"], "--tokens", 64, "--report", tmp_path / "both.html")
    assert done.exit_code == 0 and "wrote" in done.stderr
    text = _Checked((tmp_path / "both.html").read_text()).text
    assert "The same function" in text and "5 of 5 norms are of another kind" in text
    assert "Either checkpoint can stand for the other." in text and "All 32 tokens are the same." in text
    done = run("inspect", small["llama"], "--report", tmp_path / "map.html")
    text = _Checked((tmp_path / "map.html").read_text()).text
    assert done.exit_code == 0 and "5 norms on 1 residual stream; placement pre." in text and "read by" in text
    assert "What to do next" not in text


def test_a_model_without_a_stream_has_a_map_all_the_same():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)

        def forward(self, x):
            return x + self.linear(self.norm(x))

    normmap = normswap.inspect(Net().eval(), inputs={"x": torch.rand(2, 3, 16)})
    text = page(of_model(normmap, "net"))
    assert "1 norm on 0 residual streams" in text and "norm</th>" in text


# -- size, time, a browser ---------------------------------------------------------------------------------------------


def test_a_page_of_24_layers_is_small_and_quick(found):
    """The findings of two layers, as if there were 24: a page of them all, in well under 10 seconds."""
    import time

    two = found["exact"]
    report = two.reports["mathematics"]
    sites, streams = (
        tuple(
            part.model_copy(update={"site": part.site.replace(".0.", f".{n}.")})
            for n in range(24)
            for part in getattr(report.comparison, name)
            if ".0." in part.site
        )
        for name in ("sites", "streams")
    )
    comparison = report.comparison.model_copy(update={"sites": sites, "streams": streams})
    edits = tuple(
        edit.model_copy(update={"tensor": edit.tensor.replace(".0.", f".{n}.")}) if hasattr(edit, "tensor") else edit
        for n in range(24)
        for edit in two.plan.edits
    )
    many = two.model_copy(
        update={
            "reports": {**two.reports, "mathematics": report.model_copy(update={"comparison": comparison})},
            "plan": two.plan.model_copy(update={"edits": edits}),
        }
    )
    assert len(sites) == 48
    begun = time.process_time()
    text = page(many)
    # measured: 0.3 s and 0.14 MB
    assert time.process_time() - begun < 5 and len(text.encode()) < 2_000_000


_MEASURE = """<!doctype html><body><script>
const pages = PAGES, widths = [1280, 390], found = [];
pages.forEach((page, i) => widths.forEach((width, j) => {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.srcdoc = atob(page);
  frame.onload = () => {
    const inside = frame.contentDocument, root = inside.documentElement;
    const drawings = inside.querySelectorAll("svg").length;
    found[2 * i + j] = [root.scrollWidth - root.clientWidth, drawings, root.scrollHeight].join(",");
    document.title = found.join(";");
  };
  document.body.append(frame);
}));
</script>"""


def measured(texts: list[str], folder: Path) -> list[tuple[int, int, int]]:
    """Of each page, on a desk and on a phone: by how much it is too wide, its drawings, its height."""
    # without its own policy, which lets no script look into it
    plain = [re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text) for text in texts]
    coded = [base64.b64encode(text.encode("ascii", "xmlcharrefreplace")).decode() for text in plain]
    (folder / "frames.html").write_text(_MEASURE.replace("PAGES", json.dumps(coded)))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    command += ["--window-size=1400,2000", "--virtual-time-budget=4000", "--dump-dom", f"file://{folder}/frames.html"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r"<title>(.*?)</title>", shown.stdout)
    assert found, shown.stderr[-1000:]
    return [tuple(map(int, frame.split(","))) for frame in found[1].split(";")]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_it_without_anything_out_of_place(pages, streams, tmp_path):
    """At the width of a desk and of a phone nothing is wider than the window, and pages have their drawings."""
    texts = [*pages.values(), page(of_folder(streams))]
    frames = measured(texts, tmp_path)
    assert len(frames) == 2 * len(texts) == 8
    for number, (too_wide, drawings, height) in enumerate(frames):
        assert too_wide == 0 and height > 1000
        assert drawings == texts[number // 2].count("<svg") >= 2


@pytest.mark.parametrize(
    "values", [(0.0, 1.0), (-0.3, 0.36), (3.99, 4.13), (1e-5, 2.1e-5), (-4e-3, 7e-4), (0.0, 1234.0), (5.0, 5.0)]
)
def test_axes_have_ticks_within_their_range(values):
    scale = linear_scale(values)
    ticks = scale.ticks(4)
    assert 2 <= len(ticks) <= 9 and all(scale.low - 1e-12 <= tick <= scale.high + 1e-12 for tick in ticks)
    assert all(0 <= scale.at(tick) <= 1 for tick in ticks)
