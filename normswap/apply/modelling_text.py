"""The text of a generated modelling file, laid out as `ruff format` leaves it at 120 columns.

What differs between two files is data at the top (which modules, with which arguments) and the list of classes. The
norm, the centring and the functions that put them in place are the sources of `normswap.norms` and `apply.rebuild`
word for word; those that a file does not need are left out of it.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from normswap.apply import rebuild
from normswap.apply.folding import fold
from normswap.norms.centred import CentredInput, CentredOutput, centre_input, centre_output
from normswap.norms.rms_norm import RMSNorm
from normswap.planning.edits import CentreInput, CentreOutput, GrowBias, ModuleEdit, SwapNorm
from normswap.planning.plans import Plan

PREFIX = "Normswap"
WIDTH = 120


@dataclass(frozen=True)
class Offer:
    """A stock class that gets a converted form, and the names of the Auto classes that are to find it."""

    stock: type[PreTrainedModel]
    autos: tuple[str, ...]

    @property
    def name(self) -> str:
        return PREFIX + self.stock.__name__


@dataclass(frozen=True)
class Tables:
    """Module edits as the file states them: by pattern of module paths, each value as source text.

    Attributes:
        norms: `dict(...)` of arguments of RMSNorm.
        outputs, inputs: axes along which a module's output or first input is centred.
        biases: sizes.
    """

    norms: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, edits: Mapping[str, ModuleEdit], paths: Iterable[str]) -> Tables:
        """`edits` by path, folded over layers; `paths` are all modules of the model that the paths belong to."""
        paths = list(paths)
        norms = {path: _arguments(edit) for path, edit in edits.items() if isinstance(edit, SwapNorm)}
        outputs = {path: str(edit.axis) for path, edit in edits.items() if isinstance(edit, CentreOutput)}
        inputs = {path: str(edit.axis) for path, edit in edits.items() if isinstance(edit, CentreInput)}
        biases = {path: str(edit.size) for path, edit in edits.items() if isinstance(edit, GrowBias)}
        return cls(*(fold(found, paths) for found in (norms, outputs, inputs, biases)))

    def patterns(self) -> list[str]:
        return [*self.norms, *self.outputs, *self.inputs, *self.biases]


def render(
    plan: Plan, config_class: type[PretrainedConfig], model_type: str, offers: list[Offer], base: Tables, head: Tables
) -> str:
    """The file's text.

    Args:
        plan: named in the module docstring, with its claim and reasons.
        config_class: the source's configuration class.
        model_type: of the converted configuration.
        offers: the classes, in order; the one for `plan.architecture` also gets the edits of `head`.
        base: edits within the base model, by path in it.
        head: edits outside the base model, by path in the whole model.
    """
    norms, biases = base.norms or head.norms, base.biases or head.biases
    outputs, inputs = base.outputs or head.outputs, base.inputs or head.inputs
    auto_models = [offer for offer in offers if "AutoModel" in offer.autos]
    renamed = _renamed(config_class.model_type, model_type, offers)

    statements = [
        _docstring(plan),
        _imports(
            {config_class, *(offer.stock for offer in offers)},
            torch=bool(norms or biases or inputs),
            auto_model=bool(auto_models),
            conversions=bool(renamed),
        ),
        _tables(base, "", "the base model"),
        _tables(head, "HEAD_", "the whole model"),
    ]
    copied = [
        *([RMSNorm] if norms else []),
        *([CentredOutput, centre_output] if outputs else []),
        *([CentredInput, centre_input] if inputs else []),
        rebuild.find,
        *([rebuild.swap_norms] if norms else []),
        *([rebuild.centre_outputs] if outputs else []),
        *([rebuild.centre_inputs] if inputs else []),
        *([rebuild.grow_biases] if biases else []),
    ]
    config_name = PREFIX + config_class.__name__
    definitions = [
        *(inspect.getsource(item) for item in copied),
        f"class {config_name}({config_class.__name__}):\n    model_type = {_literal(model_type)}",
        _converted(config_name, base),
        *(_model(offer, head if offer.stock.__name__ == plan.architecture else Tables()) for offer in offers),
    ]
    registrations = [_auto_model(config_name, offer) for offer in auto_models] + (
        [_conversions(renamed)] if renamed else []
    )

    parts = ["\n\n".join(filter(None, statements)), *definitions, "\n\n".join(registrations)]
    return "\n\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _arguments(edit: SwapNorm) -> str:
    names = ["width", "eps", "gain", "bias", "casting"]
    names += [name for name, usual in (("axis", -1), ("shape", None)) if getattr(edit, name) != usual]
    return f"dict({', '.join(f'{name}={_literal(getattr(edit, name))}' for name in names)})"


def _literal(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _docstring(plan: Plan) -> str:
    about = (
        "Each class is transformers' own with some modules exchanged as it is built: those that the tables below "
        f"name. The weights beside this file were changed to go with them. Claim: {plan.claim}. Loading needs torch "
        "and transformers alone."
    )
    lines = [f"{plan.architecture} with other norms, written by normswap.", "", *textwrap.wrap(about, WIDTH)]
    if plan.reasons:
        lines.append("")
    for reason in plan.reasons:
        lines += textwrap.wrap(reason, WIDTH, initial_indent="- ", subsequent_indent="  ")
    text = "\n".join(lines).replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{text}\n"""'


def _imports(classes: set[type], torch: bool, auto_model: bool, conversions: bool) -> str:
    members: dict[str, set[str]] = {"transformers": {"AutoModel"} if auto_model else set()}
    for cls in classes:
        public = getattr(transformers, cls.__name__, None) is cls
        members.setdefault("transformers" if public else cls.__module__, set()).add(cls.__name__)
    if conversions:
        functions = {"get_checkpoint_conversion_mapping", "register_checkpoint_conversion_mapping"}
        members["transformers.conversion_mapping"] = functions
    lines = ["import torch"] if torch else []
    lines.append("from torch import nn")
    for module in sorted(module for module in members if members[module]):
        names = sorted(members[module], key=_natural)
        line = f"from {module} import {', '.join(names)}"
        lines.append(line if len(line) <= WIDTH else f"from {module} import (\n    " + ",\n    ".join(names) + ",\n)")
    return "import re\n\n" + "\n".join(lines)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """The order in which ruff sorts imported names: numbers in them by value, case last."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part.lower()) for part in re.split(r"(\d+)", name) if part]


def _tables(tables: Tables, prefix: str, where: str) -> str:
    texts = []
    if tables.norms:
        texts.append(
            f"# Norms that become RMSNorm: path in {where} (`*`: every layer) and arguments.\n{prefix}NORMS = {{"
        )
        texts += [_entry(pattern, arguments) for pattern, arguments in tables.norms.items()] + ["}"]
    for name, axes in (("output", tables.outputs), ("input", tables.inputs)):
        if axes:
            texts.append(f"# Modules whose {name} is centred: path in {where} and axis.\n{prefix}{name.upper()}S = {{")
            texts += [f"    {_literal(pattern)}: {axis}," for pattern, axis in axes.items()] + ["}"]
    if tables.biases:
        texts.append(f"# Modules that get a bias: path in {where} and size.\n{prefix}BIASES = {{")
        texts += [f"    {_literal(pattern)}: {size}," for pattern, size in tables.biases.items()] + ["}"]
    return "\n".join(texts)


def _entry(pattern: str, call: str) -> str:
    """One line of a table; its call is broken, as ruff does, where the line would be too long."""
    line = f"    {_literal(pattern)}: {call},"
    if len(line) <= WIDTH:
        return line
    return f"    {_literal(pattern)}: dict(\n        {call.removeprefix('dict(').removesuffix(')')}\n    ),"


def _calls(tables: Tables, prefix: str, model: str) -> list[str]:
    return [
        *([f"swap_norms({model}, {prefix}NORMS)"] if tables.norms else []),
        *([f"centre_outputs({model}, {prefix}OUTPUTS)"] if tables.outputs else []),
        *([f"centre_inputs({model}, {prefix}INPUTS)"] if tables.inputs else []),
        *([f"grow_biases({model}, {prefix}BIASES)"] if tables.biases else []),
    ]


INIT = """
    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
"""


def _converted(config_name: str, base: Tables) -> str:
    text = f'''
class Converted:
    """Mixin: the stock class beside it, with the base model's modules exchanged once it is built."""

    config_class = {config_name}
'''
    if base.patterns():
        text += INIT + (
            "        base = self.base_model\n"
            "        # stock classes that build their base model with AutoModel get one that is converted already\n"
            "        if base is self or not isinstance(base, Converted):\n"
        )
        text += "".join(f"            {call}\n" for call in _calls(base, "", "base"))
    return text


def _model(offer: Offer, head: Tables) -> str:
    text = f"class {offer.name}(Converted, {offer.stock.__name__}):"
    if len(text) > WIDTH:
        text = f"class {offer.name}(\n    Converted, {offer.stock.__name__}\n):"
    if not head.patterns():
        return text + "\n    pass"
    return text + INIT + "\n".join(f"        {call}" for call in _calls(head, "HEAD_", "self"))


def _auto_model(config_name: str, offer: Offer) -> str:
    return (
        "# AutoModel.from_config gives the converted base model, here and inside stock classes that call it.\n"
        f"AutoModel.register({config_name}, {offer.name}, exist_ok=True)"
    )


def _renamed(old_type: str, new_type: str, offers: list[Offer]) -> dict[str, str]:
    """New name -> old for each name under which transformers knows how to convert a checkpoint of the source."""
    renamed = {new_type: old_type} | {offer.name: offer.stock.__name__ for offer in offers}
    return {new: old for new, old in renamed.items() if get_checkpoint_conversion_mapping(old) is not None}


def _conversions(renamed: dict[str, str]) -> str:
    pairs = "".join(f"    {_literal(new)}: {_literal(old)},\n" for new, old in renamed.items())
    return (
        "# The checkpoint names or groups some tensors otherwise than the model does. How to convert them is found\n"
        "# by class name or model type, which are new here: new -> stock.\n"
        f"CONVERSIONS = {{\n{pairs}}}\n"
        "for new, stock in CONVERSIONS.items():\n"
        "    register_checkpoint_conversion_mapping(new, get_checkpoint_conversion_mapping(stock), overwrite=True)"
    )
