"""Low-rank adapters in the place of linear maps, while norms train as they are (PEFT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from normswap.errors import RecipeError
from normswap.planning.plans import Plan
from normswap.tune.recipe import Lora
from normswap.tune.selection import select

# what PEFT puts before a parameter's name
_PREFIX = "base_model.model."


def add_adapters(
    model: PreTrainedModel, lora: Lora, trained: Mapping[str, set[str]], plan: Plan | None, norms: Sequence[str]
):
    """The model with adapters, and by stage the names of what it trains: adapters where it was to train linear maps.

    Raises:
        RecipeError: PEFT is not installed, or does not take the settings.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError("lora: PEFT is not installed. pip install 'normswap[lora]'.") from error
    own = select(model, "norms", plan, norms)
    try:
        targets = lora.target_modules
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
        )
        model = get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"lora: {error}") from error
    found = {}
    for stage, names in trained.items():
        beside = {name.rpartition(".")[0] for name in names}
        adapters = {
            name
            for name, _ in model.named_parameters()
            if "lora_" in name and name.removeprefix(_PREFIX).partition(".lora_")[0] in beside
        }
        kept = {name for name, _ in model.named_parameters() if name.removeprefix(_PREFIX) in names & own}
        if not adapters | kept:
            raise RecipeError(f"lora: {stage} trains neither a norm nor a map that has an adapter.")
        found[stage] = adapters | kept
    return model, found
