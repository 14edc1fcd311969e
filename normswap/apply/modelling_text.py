"""The text of a generated modelling file, laid out as `ruff format` leaves it at 120 columns.

What differs between two files is data at the top (which modules, with which arguments), the rewritten classes and the
list of models. Norms, centring and the functions that put them in place are the sources of `normswap.norms` and
`apply.rebuild` word for word; those that a file does not need are left out of it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from normswap.apply import rebuild
from normswap.apply.tables import CLASSES, EVERY, WIDTH, Tables, copied, literal
from normswap.errors import PlanError
from normswap.norms.kinds import MODULES
from normswap.planning.plans import Plan
from normswap.source.classes import Rewritten

PREFIX = "Normswap"
# names that a file may define itself
_OWN = {
    *vars(rebuild),
    *(cls.__name__ for cls in MODULES.values()),
    "CentredInput",
    "CentredOutput",
    "NormedOutput",
    "Converted",
}
_AS_THEY_ARE = "# fmt: off\n# ruff: noqa\n# The lines of these classes are laid out as in transformers."


@dataclass(frozen=True)
class Offer:
    """A stock class that gets a converted form, and the names of the Auto classes that are to find it."""

    stock: type[PreTrainedModel]
    autos: tuple[str, ...]

    @property
    def name(self) -> str:
        return PREFIX + self.stock.__name__


def render(
    plan: Plan,
    config_class: type[PretrainedConfig],
    model_type: str,
    offers: list[Offer],
    base: Tables,
    head: Tables,
    classes: list[Rewritten],
) -> str:
    """The file's text.

    Args:
        plan: named in the module docstring, with its claim and reasons.
        config_class: the source's configuration class.
        model_type: of the converted configuration.
        offers: the classes, in order; the one for `plan.architecture` also gets the edits of `head`.
        base: edits within the base model, by path in it.
        head: edits outside the base model, by path in the whole model.
        classes: of rewritten modules.

    Raises:
        PlanError: a rewritten class uses a name that the file has for something else.
    """
    auto_models = [offer for offer in offers if "AutoModel" in offer.autos]
    renamed = _renamed(config_class.model_type, model_type, offers, classes)
    early = [kind for kind in EVERY if kind is not CLASSES]
    class_tables = base.text("", "the base model", [CLASSES]), head.text("HEAD_", "the whole model", [CLASSES])
    definitions = [
        *copied([base, head]),
        *([_AS_THEY_ARE] if classes else []),
        *(rewritten.text for rewritten in classes),
        *(["\n".join(["# fmt: on", *filter(None, class_tables)])] if classes else []),
    ]
    config_name = PREFIX + config_class.__name__
    bases = {rewritten.base: rewritten.name for rewritten in classes if rewritten.base in {o.stock for o in offers}}
    models = [
        f"class {config_name}({config_class.__name__}):\n    model_type = {literal(model_type)}",
        _converted(config_name, base),
        *(_model(offer, bases, head if offer.stock.__name__ == plan.architecture else Tables({})) for offer in offers),
    ]
    used = "\n".join([*definitions, *models])
    statements = [
        _docstring(plan),
        "from __future__ import annotations" if any(rewritten.lazy for rewritten in classes) else "",
        _imports(
            _members(config_class, offers, classes, bool(auto_models), bool(renamed)),
            torch=re.search(r"\btorch\.", used) is not None,
            nn=re.search(r"\bnn\.", used) is not None,
        ),
        base.text("", "the base model", early),
        head.text("HEAD_", "the whole model", early),
    ]
    definitions += models
    registrations = [_auto_model(config_name, offer) for offer in auto_models] + (
        [_conversions(renamed)] if renamed else []
    )

    parts = ["\n\n".join(filter(None, statements)), *definitions, "\n\n".join(registrations)]
    return "\n\n\n".join(part.strip("\n") for part in parts if part) + "\n"


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


def _members(
    config_class: type[PretrainedConfig],
    offers: list[Offer],
    classes: list[Rewritten],
    auto_model: bool,
    conversions: bool,
) -> dict[str, str]:
    """The module that each name is imported from."""
    members = {"AutoModel": "transformers"} if auto_model else {}
    if conversions:
        functions = ("get_checkpoint_conversion_mapping", "register_checkpoint_conversion_mapping")
        members |= dict.fromkeys(functions, "transformers.conversion_mapping")
    # what the file itself calls by a name, and what a class has already brought under it
    known: dict[str, object] = dict.fromkeys(_OWN) | {"torch": torch, "nn": nn}
    for rewritten in classes:
        for name, (module, value) in rewritten.names.items():
            if known.setdefault(name, value) is not value:
                raise PlanError(
                    f"{rewritten.base.__name__} uses {name} of {module}, and the modelling file has another {name}. "
                    "Convert the towers of this model one by one."
                )
            if name not in ("torch", "nn"):
                members.setdefault(name, module)
    for cls in [config_class, *(offer.stock for offer in offers), *(rewritten.base for rewritten in classes)]:
        public = getattr(transformers, cls.__name__, None) is cls
        members[cls.__name__] = "transformers" if public else cls.__module__
    return members


def _imports(members: dict[str, str], torch: bool, nn: bool) -> str:
    lines = ["import torch"] if torch else []
    lines += ["from torch import nn"] if nn else []
    by_module: dict[str, list[str]] = {}
    for name, module in members.items():
        by_module.setdefault(module, []).append(name)
    for module in sorted(by_module):
        names = sorted(by_module[module], key=_natural)
        line = f"from {module} import {', '.join(names)}"
        lines.append(line if len(line) <= WIDTH else f"from {module} import (\n    " + ",\n    ".join(names) + ",\n)")
    return "import re\n\n" + "\n".join(lines)


def _natural(name: str) -> tuple[int, list[tuple[int, int, str]]]:
    """The order in which ruff sorts imported names: constants, classes, others; numbers by value, case last."""
    sort = 0 if len(name) > 1 and name.isupper() else 1 if name[0].isupper() else 2
    return sort, [
        (0, int(part), "") if part.isdigit() else (1, 0, part.lower()) for part in re.split(r"(\d+)", name) if part
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
        text += "".join(f"            {call}\n" for call in base.calls("", "base"))
        if CLASSES in base.entries:
            text += "        keep_whole(self)\n"
    return text


def _model(offer: Offer, rewritten: Mapping[type, str], head: Tables) -> str:
    stock = rewritten.get(offer.stock, offer.stock.__name__)
    text = f"class {offer.name}(Converted, {stock}):"
    if len(text) > WIDTH:
        text = f"class {offer.name}(\n    Converted, {stock}\n):"
    if not head.patterns():
        return text + "\n    pass"
    calls = [*head.calls("HEAD_", "self"), *(["keep_whole(self)"] if CLASSES in head.entries else [])]
    return text + INIT + "\n".join(f"        {call}" for call in calls)


def _auto_model(config_name: str, offer: Offer) -> str:
    about = "# AutoModel.from_config gives the converted base model, here and inside stock classes that call it."
    arguments = f"{config_name}, {offer.name}, exist_ok=True"
    call = f"AutoModel.register({arguments})"
    return f"{about}\n" + (call if len(call) <= WIDTH else f"AutoModel.register(\n    {arguments}\n)")


def _renamed(old_type: str, new_type: str, offers: list[Offer], classes: list[Rewritten]) -> dict[str, str]:
    """New name -> old for each name under which transformers knows how to convert a checkpoint of the source."""
    renamed = {new_type: old_type} | {offer.name: offer.stock.__name__ for offer in offers}
    renamed |= {rewritten.name: rewritten.base.__name__ for rewritten in classes if rewritten.is_model}
    return {new: old for new, old in renamed.items() if get_checkpoint_conversion_mapping(old) is not None}


def _conversions(renamed: dict[str, str]) -> str:
    pairs = "".join(f"    {literal(new)}: {literal(old)},\n" for new, old in renamed.items())
    return (
        "# The checkpoint names or groups some tensors otherwise than the model does. How to convert them is found\n"
        "# by class name or model type, which are new here: new -> stock.\n"
        f"CONVERSIONS = {{\n{pairs}}}\n"
        "for new, stock in CONVERSIONS.items():\n"
        "    register_checkpoint_conversion_mapping(new, get_checkpoint_conversion_mapping(stock), overwrite=True)"
    )
