"""Recipes as a user writes them: their two forms, overrides, and what is said of one that is broken."""

import copy
import json
import re

import pytest
from click.testing import CliRunner, Result

from normswap.cli import main
from normswap.errors import DestinationError, NormswapError, RecipeError, RefusedError, SourceError
from normswap.tune.dry_run import foresee
from normswap.tune.recipe import Recipe
from normswap.tune.run import finetune
from normswap.tune.shipped import shipped

BASE = {
    "model": "a-model",
    "surgery": {"norm": "dyt"},
    "stages": [{"steps": 4, "learning_rate": 3e-4}],
    "output": "out",
}
STAGE = BASE["stages"][0]
FULL = """\
# A recipe that says much.
model: {path: a-model, dtype: bfloat16, config: {attn_pdrop: 0.0}}
surgery:
  - {norm: dyt, role: stream}
  - {norm: rmsnorm, role: final}
data: {source: corpus.jsonl, column: body, block: 64, held_out: 0.05}
objective: [lm, {kind: distill, weight: 0.5, temperature: 2}]
stages:
  - {name: norms first, train: norms, tokens: 4096, learning_rate: 1e-3, warmup: 0.1}
  - {train: ["*.mlp.*", "*.attn.*"], steps: 20, schedule: linear, taper: {order: ["*.ln_1", "*"], over: 0.5}}
training: {per_device_train_batch_size: 4, learning_rate: 3E-4, bf16: true}
guards: {loss: null}
output: out
"""
FULL_PYTHON = {
    "model": {"path": "a-model", "dtype": "bfloat16", "config": {"attn_pdrop": 0.0}},
    "surgery": ({"norm": "dyt", "role": "stream"}, {"norm": "rmsnorm", "role": "final"}),
    "data": {"source": "corpus.jsonl", "column": "body", "block": 64, "held_out": 0.05},
    "objective": ("lm", {"kind": "distill", "weight": 0.5, "temperature": 2}),
    "stages": (
        {"name": "norms first", "train": "norms", "tokens": 4096, "learning_rate": 1e-3, "warmup": 0.1},
        {
            "train": ("*.mlp.*", "*.attn.*"),
            "steps": 20,
            "schedule": "linear",
            "taper": {"order": ("*.ln_1", "*"), "over": 0.5},
        },
    ),
    "training": {"per_device_train_batch_size": 4, "learning_rate": 3e-4, "bf16": True},
    "guards": {"loss": None},
    "output": "out",
}


def run(*args: object) -> Result:
    """One command line in this process. What is no ordinary exit is raised."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def written(folder, text: str, name: str = "mine.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# ---- one object


def test_yaml_and_python_are_one(tmp_path):
    of_file, of_mapping = Recipe.of(written(tmp_path, FULL)), Recipe.of(FULL_PYTHON)
    assert of_file == of_mapping
    assert of_file.stages[0].learning_rate == 1e-3 and of_file.training["learning_rate"] == 3e-4
    assert [objective.kind for objective in of_file.objective] == ["lm", "distill"]
    assert [choice.words() for choice in of_file.request().norms] == [
        "--norm dyt --role stream",
        "--norm rmsnorm --role final",
    ]
    assert of_file.taper.order == ("*.ln_1", "*")


@pytest.mark.parametrize("source", [BASE, FULL_PYTHON], ids=["short", "full"])
def test_what_is_saved_is_the_whole_recipe(source, tmp_path):
    recipe = Recipe.of(source)
    text = recipe.to_yaml()
    again = Recipe.of(written(tmp_path, text))
    assert again == recipe and again.to_yaml() == text
    for key in Recipe.model_fields:  # what was left out, too
        assert re.search(rf"^{key}:", text, re.M), key
    assert "calibration_tokens: 8192" in text and "warmup: 0.0" in text


def test_short_forms():
    short = Recipe.of(BASE)
    long = BASE | {"model": {"path": "a-model"}, "surgery": [{"norm": "dyt"}], "objective": [{"kind": "lm"}]}
    assert Recipe.of(long) == short == Recipe.of(BASE | {"objective": "lm"})
    one_layer = {"surgery": {"placement": "post", "layers": 3}}  # YAML makes a number of it
    assert Recipe.of(BASE | one_layer).request().placements[0].layers == "3"


# ---- overrides


@pytest.mark.parametrize(
    "override, found, expected",
    [
        ("output=elsewhere", lambda r: r.output, "elsewhere"),
        ("model=other", lambda r: r.model.path, "other"),
        ("model.dtype=bfloat16", lambda r: (r.model.path, r.model.dtype), ("a-model", "bfloat16")),
        ("model.config.attn_pdrop=0", lambda r: r.model.config, {"attn_pdrop": 0}),
        ("data.block=32", lambda r: r.data.block, 32),
        ("stages.0.learning_rate=1e-5", lambda r: r.stages[0].learning_rate, 1e-5),
        ("stages.steps=9", lambda r: r.stages[0].steps, 9),
        ("stages.0.taper.order=[a, b]", lambda r: r.taper.order, ("a", "b")),
        ("stages.0.taper={}", lambda r: r.taper.order, "together"),
        ("surgery.norm=derf", lambda r: r.surgery[0]["norm"], "derf"),
        ("surgery.0.norm=derf", lambda r: r.surgery[0]["norm"], "derf"),
        ("surgery=[]", lambda r: r.surgery, ()),
        ("objective=mlm", lambda r: r.objective[0].kind, "mlm"),
        ("training.seed=7", lambda r: r.training, {"seed": 7}),
        ("training.run_name=a=b", lambda r: r.training, {"run_name": "a=b"}),
        ("guards.tail=null", lambda r: r.guards.tail, None),
        ("control=true", lambda r: r.control, True),
    ],
)
def test_overrides(override, found, expected, tmp_path):
    given = copy.deepcopy(BASE)
    assert found(Recipe.of(given, (override,))) == expected
    assert given == BASE  # the caller's own mapping is not written to
    text = "model: a-model\nsurgery: {norm: dyt}\nstages: [{steps: 4, learning_rate: 3e-4}]\noutput: out\n"
    assert Recipe.of(written(tmp_path, text), (override,)) == Recipe.of(BASE, (override,))


def test_another_model_is_trained_in_the_same_way():
    """What the recipe says of training stays; a revision is of the model that it named."""
    base = BASE | {"model": {"path": "a", "revision": "v1", "config": {"attn_pdrop": 0.0}}}
    found = Recipe.of(base, ("model=b",)).model
    assert (found.path, found.revision, found.config) == ("b", None, {"attn_pdrop": 0.0})
    assert Recipe.of(base, ("model={path: b}",)).model.config == {}


def test_overrides_are_done_in_order():
    two = BASE | {"stages": [{"tokens": 5}, STAGE], "training": {"learning_rate": 0.1}}
    recipe = Recipe.of(two, ("stages.0.tokens=1", "stages.0.tokens=2"))
    assert recipe.stages[0].tokens == 2 and recipe.stages[1].steps == 4


@pytest.mark.parametrize(
    "override, message",
    [
        ("training.seed", "'training.seed': expected key.sub=value, such as training.seed=1"),
        ("=1", "expected key.sub=value"),
        ("data..block=1", "expected key.sub=value"),
        ("stages.1.steps=3", "stages is a list of 1; found item '1'"),
        ("stages.-1.steps=3", "stages.0.-1: no such key; expected one of learning_rate, name, schedule"),
        ("output.folder=x", "output is 'out', which has no keys"),
        ("data.block={", "'data.block={': the value is no YAML"),
        ("data.blok=9", "data.blok: no such key; did you mean 'block'?"),
        ("training.sede=1", "`sede` is no argument of transformers.TrainingArguments; did you mean `seed`?"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(RecipeError) as refused:
        Recipe.of(BASE, (override,))
    assert message in str(refused.value)


# ---- YAML


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", "1.0e-3", ".1e-2", "+1e-3", "0.001"])
def test_every_way_to_write_a_thousandth(text):
    assert Recipe.of(BASE, (f"stages.0.learning_rate={text}",)).stages[0].learning_rate == 1e-3


def test_no_is_a_word():
    made = Recipe.of(BASE, ("training.save_strategy=no", "control=yes"))
    assert made.training["save_strategy"] == "no" and made.control is True
    assert Recipe.of(BASE, ("control=no",)).control is False


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: a\nmodel: b\n", "the key 'model' is given twice, first in line 1"),
        ("stages:\n  - steps: 1\n    steps: 2\n", "the key 'steps' is given twice, first in line 2"),
        ("- a\n- b\n", "expected keys and values (model, surgery, stages, ...), found list"),
        ("", "found NoneType"),
        ("model: [a\n", "is no YAML"),
        ("model: !!python/object:os.system {}\n", "is no YAML"),
    ],
)
def test_yaml_that_is_refused(text, message, tmp_path):
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as refused:
        Recipe.of(path)
    assert message in str(refused.value) and str(path) in str(refused.value)


def test_no_such_recipe():
    with pytest.raises(RecipeError, match="no-such.yaml is no file, and no recipe that comes with normswap"):
        Recipe.of("no-such.yaml")


# ---- broken recipes

BROKEN = [
    # no such key, at each depth
    ({"modle": "x"}, ["modle: no such key; did you mean 'model'?"]),
    ({"zzz": 1}, ["zzz: no such key; expected one of control, data, dtype"]),
    ({"model": {"path": "m", "dtpye": "float32"}}, ["model.dtpye: no such key; did you mean 'dtype'?"]),
    ({"data": {"sorce": "x"}}, ["data.sorce: no such key; did you mean 'source'?"]),
    ({"stages": [STAGE, STAGE | {"warm_up": 0.1}]}, ["stages.1.warm_up: no such key; did you mean 'warmup'?"]),
    ({"stages": [STAGE | {"taper": {"oder": "forward"}}]}, ["stages.0.taper.oder: no such key; did you mean 'order'?"]),
    ({"surgery": {"nrom": "dyt"}}, ["surgery.0.nrom: no such key; did you mean 'norm'?"]),
    ({"surgery": [{"norm": "dyt"}, {"placment": "post"}]}, ["surgery.1.placment", "did you mean 'placement'?"]),
    ({"objective": [{"kind": "distill", "temprature": 2}]}, ["objective.0.temprature", "mean 'temperature'?"]),
    ({"guards": {"lose": 1}}, ["guards.lose: no such key; did you mean 'loss'?"]),
    ({"lora": {"rank": 4}}, ["lora.rank: no such key; expected one of alpha, dropout, r, target_modules"]),
    # what is missing
    ({"stages": []}, ["stages: expected one item at least"]),
    ({"stages": None}, ["stages: expected a list, found None"]),
    ({"model": {}}, ["model.path: is missing"]),
    ({"objective": []}, ["objective: expected one item at least"]),
    ({"stages": [{"learning_rate": 1e-3}]}, ["stages.0: expected a length, either `tokens` or `steps`; found neither"]),
    ({"stages": [STAGE | {"tokens": 9}]}, ["stages.0: expected a length, either `tokens` or `steps`; found both"]),
    ({"stages": [{"steps": 4}]}, ["`stages`: expected a learning_rate in each, or one in `training`"]),
    # values
    ({"stages": {"steps": 4}}, ["stages: expected a list, found keys and values"]),
    ({"stages": [STAGE | {"steps": -4}]}, ["stages.0.steps: expected more than 0, found -4"]),
    ({"stages": [STAGE | {"steps": 2.5}]}, ["stages.0.steps: expected a whole number, found 2.5"]),
    ({"stages": [{"steps": 4, "learning_rate": "fast"}]}, ["stages.0.learning_rate: expected a number, found 'fast'"]),
    (
        {"stages": [STAGE | {"schedule": "cosin"}]},
        ["stages.0.schedule: expected 'constant', 'linear' or 'cosine'"],
    ),
    ({"stages": [STAGE | {"train": []}]}, ["stages.0.train: expected text, or one item at least, found []"]),
    (
        {"stages": [STAGE | {"taper": "forward"}]},
        ["stages.0.taper: expected keys and values (order, over, shape)"],
    ),
    (
        {"stages": [STAGE | {"taper": {"order": "foward"}}]},
        ["stages.0.taper.order: expected 'together', 'forward' or 'backward', or a list", "did you mean 'forward'?"],
    ),
    ({"objective": "distil"}, ["objective.0", "found 'distil'; did you mean 'distill'?"]),
    ({"objective": {"weight": 2}}, ["objective.0: expected keys and values, among them `kind`"]),
    ({"data": {"block": 4}}, ["data.block: expected 8 or more, found 4"]),
    ({"data": "corpus.txt"}, ["data: expected keys and values (block, ", "found 'corpus.txt'"]),
    ({"verify": "none"}, ["verify: expected 'full' or 'fast', found 'none'"]),
    ({"kernels": "lieger"}, ["kernels.backend: expected auto, or of ", "liger", "found 'lieger'"]),
    ({"kernels": ["auto", "torch"]}, ["kernels.backend: expected auto, or of "]),
    ({"kernels": {"backends": "torch"}}, ["kernels.backends: no such key; did you mean 'backend'?"]),
    # the surgery
    ({"surgery": "dyt"}, ["surgery: expected options of `normswap convert`, such as {norm: dyt}, or a list of such"]),
    ({"surgery": {"norm": "dtt"}}, ["`surgery`: norm 'dtt' is not offered: expected one of", "repbn", "mean dyt?"]),
    ({"surgery": {"norm": "dyt", "role": "strem"}}, ["`surgery`: role 'strem' is not known: expected one of"]),
    ({"surgery": {"placement": "pots"}}, ["`surgery`: placement 'pots' is not offered: expected one of"]),
    ({"surgery": {"placement": "post", "layers": "a-b"}}, ["expects numbers and ranges such as 0-3,7; found 'a-b'"]),
    ({"surgery": {"placement": "post", "layers": "auto:x"}}, ["expected auto:KL, with a number of nats"]),
    ({"surgery": {"placement": "post", "layers": 1.5}}, ["surgery.0.layers: expected text, or a list, found 1.5"]),
    ({"surgery": {"layers": "1"}}, ["layers 1 belong to no placement"]),
    ({"surgery": {"tied": "maybe"}}, ["surgery.0.tied: expected 'keep' or 'untie', found 'maybe'"]),
    (
        {"surgery": [{"tied": "untie", "explicit": "never"}, {"explicit": "always"}]},
        ["different things: explicit"],
    ),
    # arguments of the Trainer
    (
        {"training": {"output_dir": "x", "max_steps": 4}},
        ["training: `output_dir` is decided by `output`", "`max_steps` is decided by the lengths of `stages`"],
    ),
    ({"training": {"resume_from_checkpoint": "x"}}, ["`resume_from_checkpoint` is decided by --resume"]),
    ({"training": {"warmup": 4}}, ["`warmup` is no argument of transformers.TrainingArguments"]),
    ({"training": {"weight_dcay": 4}}, ["did you mean `weight_decay`?"]),
    ({"training": {"fsdp": 1.5}}, ["`fsdp` is 1.5, and transformers.TrainingArguments takes"]),
    ({"training": {"seed": "many"}}, ["`seed` is 'many', and transformers.TrainingArguments takes int"]),
    ({"training": 4}, ["training: expected keys and values, found 4"]),
    # what does not go together
    ({"stages": [STAGE | {"taper": {}}] * 2}, ["`stages`: one of them may have a taper; give its sites an order"]),
    ({"surgery": [], "stages": [STAGE | {"taper": {}}]}, ["`stages`: there is nothing to taper without a surgery"]),
    ({"lora": {}, "stages": [STAGE | {"taper": {}}]}, ["`lora`: not with a taper"]),
    ({"objective": ["lm", "mlm"]}, ["`objective`: lm, mlm and classification read other inputs each"]),
    ({"objective": ["lm", "lm"]}, ["`objective`: each kind once"]),
    ({"stages": [STAGE | {"name": "a"}] * 2}, ["`stages`: each name once; found a, a"]),
    ({"training": {"save_only_model": True}}, ["`save_only_model` is decided by --resume, which needs all of a"]),
    (
        {"objective": "classification"},
        ["`data.label`: the objective classification needs the column", "`data.pack`: each row is one text"],
    ),
    ({"objective": "embedding"}, ["`data.pack`: each row is one text for this objective; expected false"]),
]


@pytest.mark.parametrize("change, messages", BROKEN, ids=[str(change)[:60] for change, _ in BROKEN])
def test_broken_recipes(change, messages):
    with pytest.raises(RecipeError) as refused:
        Recipe.of(BASE | change)
    found = str(refused.value)
    assert found.startswith("the recipe:\n")
    for message in messages:
        assert message in found
    # no line for a fault that is not there, and none in the words of pydantic
    assert 2 <= len(found.splitlines()) <= 1 + len(messages), found
    assert "Input should" not in found and "tuple" not in found and "literal[" not in found


def test_all_faults_at_once():
    change = {
        "data": {"block": "wide", "sorce": 1},
        "stages": [{"steps": 1, "tokens": 2}, {"steps": 1, "taper": {"shape": "square"}}],
        "training": {"seeed": 1, "num_train_epochs": 3},
        "vrify": "fast",
    }
    with pytest.raises(RecipeError) as refused:
        Recipe.of(BASE | change)
    assert str(refused.value).splitlines() == [
        "the recipe:",
        "  data.block: expected a whole number, found 'wide'",
        "  data.sorce: no such key; did you mean 'source'?",
        "  stages.0: expected a length, either `tokens` or `steps`; found both",
        "  stages.1.taper.shape: expected 'cosine' or 'linear', found 'square'",
        "  training: `seeed` is no argument of transformers.TrainingArguments; did you mean `seed`?",
        "  training: `num_train_epochs` is decided by the lengths of `stages`",
        "  vrify: no such key; did you mean 'verify'?",
    ]


# ---- recipes that do not fit their model or data


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    written(folder, "To be", "short.txt")
    written(folder, "\n".join(json.dumps({"body": f"row {i}"}) for i in range(40)), "rows.jsonl")
    written(folder, "{no json", "bad.jsonl")
    (folder / "mixed").mkdir()
    written(folder / "mixed", "x", "a.txt")
    written(folder / "mixed", "text\nx", "b.csv")
    (folder / "empty").mkdir()
    return folder


UNFIT = [
    ("model=no/such/folder", SourceError, "no/such/folder is no folder"),
    ("model={files}", SourceError, "has no config.json"),
    ("model.config.no_such_key=1", RecipeError, "model.config: a GPT2Config has no key 'no_such_key'"),
    ("model.attn_implementation=fast", RecipeError, 'cannot be loaded so: Specified `attn_implementation="fast"`'),
    ("data.source={files}/no-such.txt", RecipeError, "no-such.txt is no file, nor a folder or pattern of .txt, .jsonl"),
    ("data.source={files}/*.md", RecipeError, "*.md is no file, nor a folder or pattern"),
    ("data.source={files}/empty", RecipeError, "empty is no file, nor a folder or pattern of .txt"),
    ("data.source={files}/mixed", RecipeError, "mixed to be of one kind of .txt, .jsonl"),
    ("data.source={files}/bad.jsonl", RecipeError, "bad.jsonl cannot be read as json: "),
    (
        "data.source={files}/rows.jsonl",
        RecipeError,
        "column is 'text', and {files}/rows.jsonl has the columns body",
    ),
    ("data.source={files}/short.txt", RecipeError, "gives 0 blocks of 64 tokens; expected 2 at least"),
    ("data.held_out_source={files}/short.txt", RecipeError, "short.txt gives 0 blocks of 64 tokens"),
    ("data.source=no-one/no-such", RecipeError, "no-one/no-such is no local file and could not be had from the Hub"),
    ("data.block=512", RecipeError, "data.block is 512, and the model has positions for 256 tokens"),
    ("data.pack=false", RecipeError, "rows of different length need padding, and its tokenizer has no pad token"),
    ("objective=mlm", RecipeError, "has no mask token; is it lm?"),
    (
        "stages.0.train=['*.no_such.*']",
        RecipeError,
        "train '*.no_such.*' means no parameter of this model. Expected",
    ),
    ("surgery.layers=9", RefusedError, "this model has no layer 9; expected numbers from 0 to 1"),
    ("surgery.sites='*.no_such'", RefusedError, "no norm that --norm rmsnorm --sites '*.no_such' names. Its norms are"),
    ("stages.0.taper={}", RefusedError, "nothing of it can be tapered, it is exact as it is. Leave `taper` out"),
]


@pytest.mark.parametrize("override, kind, message", UNFIT, ids=[case[0] for case in UNFIT])
def test_recipes_that_do_not_fit(override, kind, message, files, small):
    recipe = BASE | {"model": str(small["gpt2"]), "data": {"block": 64, "calibration_tokens": 512}}
    recipe["surgery"] = {"placement": "post"} if "layers" in override else {"norm": "rmsnorm"}
    with pytest.raises(kind) as refused:
        foresee(Recipe.of(recipe, (override.replace("{files}", str(files)),)))
    assert message.replace("{files}", str(files)) in str(refused.value)


def test_a_dry_run_checks_the_order_of_a_taper(small):
    recipe = BASE | {"model": str(small["gpt2"]), "data": {"block": 64, "calibration_tokens": 512}}
    recipe |= {"surgery": {"norm": "dyt", "role": "final"}}
    with pytest.raises(RecipeError, match=r"no pattern fits transformer.ln_f \(1 of 1 sites\)"):
        foresee(Recipe.of(recipe, ("stages.0.taper.order=['*.ln_1']",)))


def test_an_output_that_is_there_and_a_source_that_was_converted(tmp_path, small):
    import normswap

    converted = tmp_path / "converted"
    normswap.convert(small["gpt2"], converted, norm="rmsnorm", verify="none")
    recipe = BASE | {"model": str(small["gpt2"]), "output": str(converted)}
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DestinationError, match="exists"):
        finetune(Recipe.of(recipe))
    with pytest.raises(RecipeError, match="Give the recipe the checkpoint that it was made from"):
        finetune(Recipe.of(BASE | {"model": str(converted), "output": str(tmp_path / "out")}))
    with pytest.raises(NormswapError, match="source|inside|itself"):
        finetune(Recipe.of(BASE | {"model": str(converted), "output": str(converted)}))
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing was begun


# ---- the command line


def test_recipe_list_and_show(tmp_path):
    listed = run("recipe", "list", "--json")
    assert listed.exit_code == 0 and json.loads(listed.stdout).keys() == shipped().keys()
    for name in shipped():
        assert run("recipe", "show", name).stdout == shipped()[name].read_text(encoding="utf-8")
        assert name in run("recipe", "list").stdout and json.loads(listed.stdout)[name], "it says what it is for"
    mine = written(tmp_path, FULL)
    assert run("recipe", "show", mine).stdout == FULL
    resolved = run("recipe", "show", mine, "--resolved")
    assert resolved.stdout == Recipe.of(mine).to_yaml() and resolved.stderr == ""


def test_recipe_validate(tmp_path):
    good, bad, worse = (written(tmp_path, FULL, f"{name}.yaml") for name in ("good", "bad", "worse"))
    bad.write_text(FULL.replace("norm: dyt", "norm: dtt").replace("over:", "ovr:"), encoding="utf-8")
    worse.write_text(FULL.replace("output: out\n", ""), encoding="utf-8")
    done = run("recipe", "validate", good)
    assert done.exit_code == 0 and done.stdout == "" and done.stderr == f"{good}: in order\n"
    done = run("recipe", "validate", bad, good, worse, tmp_path / "none.yaml")
    assert done.exit_code == 2 and done.stdout == ""
    for message in (
        f"{good}: in order\n",
        f"{bad}:\n  stages.1.taper.ovr: no such key; did you mean 'over'?\n",
        f"{worse}:\n  output: is missing\n",
        "none.yaml is no file, and no recipe",
    ):
        assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["finetune", "recipe show --resolved"])
def test_a_broken_recipe_on_the_command_line(command, tmp_path):
    mine = written(tmp_path, FULL.replace("block:", "blok:"))
    done = run(*command.split(), mine)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr == f"Error: {mine}:\n  data.blok: no such key; did you mean 'block'?\n"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_recipe_schema():
    done = run("recipe", "schema")
    schema = json.loads(done.stdout)
    assert done.exit_code == 0 and done.stderr == ""
    assert schema["properties"].keys() == Recipe.model_fields.keys() and schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", "stages", "output"}
    parts = schema["$defs"]
    for name in ("Data", "Guards", "Lora", "Model", "Stage", "Taper"):
        assert parts[name]["additionalProperties"] is False and parts[name]["description"]
    assert {"tokens", "steps", "taper", "train", "learning_rate"} <= parts["Stage"]["properties"].keys()
    assert {"norm", "placement", "layers", "fold", "rotate"} <= parts["Words"]["properties"].keys()
    assert parts["Taper"]["properties"]["shape"]["enum"] == ["cosine", "linear"]
    # the short forms are in order as well: an editor is not to mark them
    properties = schema["properties"]
    assert {"type": "string"} in properties["model"]["anyOf"]
    assert {"$ref": "#/$defs/Words"} in properties["surgery"]["anyOf"]
    assert any("lm" in option.get("enum", ()) for option in properties["objective"]["anyOf"])
