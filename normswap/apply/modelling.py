"""The modelling file of a converted checkpoint, for structure that no stock class has.

`modeling_normswap.py` goes beside the weights. It subclasses the stock classes and needs torch and transformers alone.
Its `model_type` is its own: under the source's, transformers would load the stock class without a word whenever
`trust_remote_code` is not given.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass, _get_model_class
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from normswap.apply.folding import expand
from normswap.apply.live import apply_structure, without_storage
from normswap.apply.modelling_text import PREFIX, Offer, render
from normswap.apply.tables import Tables
from normswap.errors import PlanError, SourceError
from normswap.planning.edits import Rewrite
from normswap.planning.plans import Plan
from normswap.source.classes import Rewritten, rewritten_classes

FILE = "modeling_normswap.py"


def write_modelling(
    folder: Path,
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    plan: Plan,
    meta_model: PreTrainedModel,
    base_output_unchanged: bool = False,
) -> dict[str, object]:
    """Write `modeling_normswap.py` into `folder`.

    Args:
        folder: an existing folder.
        model_class: the stock class of the source checkpoint.
        config: the source's configuration; not changed.
        plan: what was done to the weights; at least one of its edits is of a module.
        meta_model: a `model_class` built from `config`, before any edit, the meta device will do; not changed.
        base_output_unchanged: whether the converted base model computes what the source's does. Then every task class
            that transformers maps to the configuration is offered, else only the checkpoint's own and the base model.

    Returns:
        Keys to set in the source's `config.json`, each replacing what is there.

    Raises:
        PlanError: the plan does not fit the model, changes no module (the stock class will do), or `model_class` is not
            part of transformers.
    """
    if not model_class.__module__.startswith("transformers."):
        raise PlanError(
            f"{model_class.__name__} comes with its checkpoint ({model_class.__module__}), and the modelling file can "
            "only subclass transformers' own classes; convert a checkpoint of a model that transformers has."
        )
    if not plan.module_edits():
        raise PlanError(
            "the plan changes no module: the stock class loads the result, and no modelling file is needed."
        )
    converted = without_storage(meta_model)
    apply_structure(converted, plan)

    classes = rewritten_classes(meta_model, [edit for edit in plan.module_edits() if isinstance(edit, Rewrite)])
    base, head = _tables(plan, meta_model, classes)
    offers = _offers(model_class, converted.config, meta_model, base, plan, base_output_unchanged)
    model_type = f"normswap_{config.model_type}"
    distinct = list({id(rewritten): rewritten for rewritten in classes.values()}.values())
    (folder / FILE).write_text(render(plan, type(config), model_type, offers, base, head, distinct))

    stem = Path(FILE).stem
    autos = {"AutoConfig": PREFIX + type(config).__name__}
    autos |= {auto: offer.name for offer in offers for auto in offer.autos}
    keys = {
        "model_type": model_type,
        "architectures": [PREFIX + model_class.__name__],
        "auto_map": {auto: f"{stem}.{name}" for auto, name in autos.items()},
        **_changed(meta_model.config, converted.config),
    }
    # where a tokenizer's own files name no class, AutoTokenizer finds one by model_type, or else by this key
    tokenizer = TOKENIZER_MAPPING_NAMES.get(config.model_type)
    if tokenizer not in (None, "TokenizersBackend") and getattr(config, "tokenizer_class", None) is None:
        keys["tokenizer_class"] = tokenizer
    return keys


def load_generated(folder: str | Path) -> type[PreTrainedModel]:
    """The class that the modelling file in `folder` defines for its `config.json`, imported from where it lies.

    Nothing is copied into the Hub's module cache, and no bytecode is left in the folder. Each text in each folder is a
    module of its own, so that several may be open at once.

    Raises:
        SourceError: the folder has no such file or configuration, or the file does not define the class.
    """
    path = Path(folder).resolve() / FILE
    try:
        text = path.read_text()
        architecture = json.loads((path.parent / "config.json").read_text())["architectures"][0]
    except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
        raise SourceError(f"{folder} is no converted folder with a {FILE} and a config.json: {error!r}") from error
    name = f"{path.stem}_{hashlib.sha256(f'{path}:{text}'.encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        module = ModuleType(name)
        module.__file__ = str(path)
        # transformers looks up the module of a class while the class is being defined
        sys.modules[name] = module
        try:
            exec(compile(text, path, "exec"), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    if not hasattr(sys.modules[name], architecture):
        raise SourceError(f"{path} does not define {architecture}, the architecture that config.json names.")
    return getattr(sys.modules[name], architecture)


def _tables(plan: Plan, model: PreTrainedModel, classes: dict[str, Rewritten]) -> tuple[Tables, Tables]:
    """The plan's module edits in the base model, by path within it, and the others, by path in the whole model."""
    prefix = _base_prefix(model)
    base, head = [], []
    for edit in plan.module_edits():
        if f"{edit.module}.".startswith(prefix):
            base.append(edit.model_copy(update={"module": edit.module[len(prefix) :]}))
        else:
            head.append(edit)
    within = {path[len(prefix) :]: rewritten for path, rewritten in classes.items() if f"{path}.".startswith(prefix)}
    return Tables.of(base, _paths(model.base_model), within), Tables.of(head, _paths(model), classes)


def _base_prefix(model: PreTrainedModel) -> str:
    path = next(path for path, module in model.named_modules() if module is model.base_model)
    return f"{path}." if path else ""


def _paths(model: torch.nn.Module) -> list[str]:
    return [path for path, _ in model.named_modules()]


def _offers(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    model: PreTrainedModel,
    base: Tables,
    plan: Plan,
    base_output_unchanged: bool,
) -> list[Offer]:
    """The classes to offer: base model, checkpoint's own, then the other task classes in transformers' order."""
    # some Auto classes know several classes for one configuration, and choose by this
    config = copy.deepcopy(config)
    config.architectures = [model_class.__name__]
    base_class = type(model.base_model)
    autos: dict[type[PreTrainedModel], list[str]] = {base_class: [], model_class: []}
    for auto in _auto_classes():
        if type(config) in auto._model_mapping:
            stock = _get_model_class(config, auto._model_mapping)
            if base_output_unchanged or auto is transformers.AutoModel or stock is model_class:
                autos.setdefault(stock, []).append(auto.__name__)
    if not any(transformers.AutoModel.__name__ in names for names in autos.values()):
        autos[base_class].append(transformers.AutoModel.__name__)
    return [
        Offer(stock, tuple(names))
        for stock, names in autos.items()
        if stock is model_class or (names and _fits(stock, config, model, base, plan))
    ]


def _auto_classes() -> list[type[_BaseAutoModelClass]]:
    """Every public Auto class of models that looks its classes up by configuration."""
    found, waiting = [], [_BaseAutoModelClass]
    while waiting:
        cls = waiting.pop(0)
        waiting += cls.__subclasses__()
        if cls._model_mapping is not None and getattr(transformers, cls.__name__, None) is cls:
            found.append(cls)
    return found


def _fits(
    stock: type[PreTrainedModel], config: PretrainedConfig, source: PreTrainedModel, tables: Tables, plan: Plan
) -> bool:
    """Whether the plan does to the base model within `stock` what it does to the source's, and nothing else to `stock`.

    Where `tables` point there must be the very modules that the source's base model has, and a tensor that the plan
    edits may not be tied to one that the source does not have tied to it: a head that reads the embedding, say.
    """
    try:
        with torch.device("meta"):
            other = stock(copy.deepcopy(config))
    except Exception:
        # a class that this configuration does not suffice for (a backbone, another modality) is not offered
        return False
    edited = {name.removeprefix(_base_prefix(source)) for name in plan.tensor_edits()}
    if any(edited & tie for tie in _ties(other) - _ties(source)):
        return False
    theirs, ours = dict(other.base_model.named_modules()), dict(source.base_model.named_modules())
    for pattern in tables.patterns():
        paths = expand(pattern, ours)
        if expand(pattern, theirs) != paths:
            return False
        if any(type(theirs[path]) is not type(ours[path]) for path in paths):
            return False
    return True


def _ties(model: PreTrainedModel) -> set[frozenset[str]]:
    """Pairs of tied tensors, those within the base model by their names in it."""
    prefix = _base_prefix(model)
    pairs = model.all_tied_weights_keys.items()
    return {frozenset(name.removeprefix(prefix) for name in pair) for pair in pairs}


def _changed(before: PretrainedConfig, after: PretrainedConfig) -> dict[str, object]:
    """The top-level keys that the plan's structure changed in the configuration, as JSON has them."""
    old, new = (json.loads(config.to_json_string(use_diff=False)) for config in (before, after))
    return {key: value for key, value in new.items() if key not in old or old[key] != value}
