"""Load source and converted checkpoints as a user does who has no normswap, and print how far they are apart.

    python -I load_stock.py FOLDER ...    # each with source/, converted/ and inputs.pt, see disk.py

One line of JSON per folder: its name and the worst relative error of an output, or why there is none.
"""

import json
import sys
import traceback
from pathlib import Path


class NoNormswap:
    """Whoever asks for normswap here finds that it is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "normswap":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoNormswap())

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.dynamic_module_utils import get_class_from_dynamic_module  # noqa: E402

OPTIONS = dict(dtype="auto", attn_implementation="eager", output_loading_info=True)


def load(folder):
    """The model that the folder's configuration names, by transformers alone."""
    config = json.loads((folder / "config.json").read_text())
    name, references = config["architectures"][0], config.get("auto_map", {})
    auto = next((auto for auto, where in references.items() if where.endswith(f".{name}")), None)
    if auto is not None:
        model, info = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, **OPTIONS)
    elif references:  # its task has no Auto class: by the class itself, as for the stock one
        module = references["AutoConfig"].partition(".")[0]
        model, info = get_class_from_dynamic_module(f"{module}.{name}", folder).from_pretrained(folder, **OPTIONS)
    else:
        model, info = stock_class(name, config["model_type"]).from_pretrained(folder, **OPTIONS)
    if type(model).__name__ != name:
        raise TypeError(f"expected a {name}, found a {type(model).__name__}")
    wrong = {what: sorted(keys)[:4] for what, keys in info.items() if keys and what != "unexpected_keys"}
    if wrong:
        raise ValueError(f"not all weights were loaded: {wrong}")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def stock_class(name, model_type):
    if hasattr(transformers, name):
        return getattr(transformers, name)
    module = transformers.CONFIG_MAPPING[model_type].__module__.replace(".configuration_", ".modeling_")
    return getattr(__import__(module, fromlist=[name]), name)


def floats(tree):
    if isinstance(tree, torch.Tensor):
        return [tree.detach().double()] if tree.is_floating_point() and tree.numel() else []
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for part in parts for tensor in floats(part)]


@torch.no_grad()
def outputs(model, inputs):
    torch.manual_seed(0)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    moved = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    return floats(model(**moved))


def error(folder):
    """The worst relative error of an output, over its finite values; infinite where those are not the same."""
    inputs = torch.load(folder / "inputs.pt")
    models = [load(folder / name) for name in ("source", "converted")]
    try:
        source, converted = (outputs(model, inputs) for model in models)
    except RuntimeError:  # some models' own code runs in float32 alone
        source, converted = (outputs(model.float(), inputs) for model in models)
    if [t.shape for t in source] != [t.shape for t in converted]:
        raise ValueError("the outputs are not of the same shapes")
    if not any(t.isfinite().any() for t in source):
        raise ValueError("nothing that the source gives is finite")
    errors = []
    for a, b in zip(source, converted, strict=True):
        finite = a.isfinite()
        same = torch.equal(finite, b.isfinite())
        size = a[finite].norm().clamp_min(1e-30)
        errors.append(float((b - a)[finite].norm() / size) if same else float("inf"))
    return max(errors)


def main():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for folder in map(Path, sys.argv[1:]):
        found = {"name": folder.name}
        try:
            found["error"] = error(folder)
        except Exception as failure:
            found["why"] = f"{type(failure).__name__}: {failure}"[:600]
            found["at"] = traceback.format_exc()[-600:]
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
