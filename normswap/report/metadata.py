"""The top of a model card, in the Hub's format."""

from __future__ import annotations

from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from normswap.checkpoint.publish import README
from normswap.checkpoint.source import Source

#: what a source's card says that holds for the converted model as well
_CARRIED = ("license", "license_name", "license_link", "pipeline_tag")
#: tags of a source that name a form of its weights, which is left behind
_FORMS = {"gguf", "onnx", "pytorch", "tf", "jax", "flax", "rust", "coreml", "openvino", "tflite", "mlx"}


def _texts(value: object) -> list[str]:
    """Texts of a list, or the one text that there is; YAML takes a language such as `no` for something else."""
    values = value if isinstance(value, list) else [value]
    return values if all(isinstance(text, str) for text in values) else []


def metadata(source: Source, trained: bool) -> str:
    """YAML for the top of the card; what the source's says of licence, language, task and tags holds on."""
    known = {"library_name": "transformers", "tags": ["normswap"]}
    if source.title == source.name:
        known["base_model"] = source.name
        # of the relations that the Hub knows, a conversion without training is none
        known |= {"base_model_relation": "finetune"} if trained else {}
    card = source.folder / README
    try:
        found = (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, YAMLError, OSError):  # a card that nobody can read says nothing
        found = {}
    known |= {key: found[key] for key in _CARRIED if key in found}
    known["tags"] += [tag for tag in _texts(found.get("tags")) if tag.lower() not in _FORMS and tag != "normswap"]
    known |= {"language": found["language"]} if _texts(found.get("language")) else {}
    return ModelCardData(**known).to_yaml()
