"""Conversions from folder to folder over a spread of types, loaded by transformers in a process without normswap.

Every source is a small random model in float64. Source and result are loaded as a user loads them and compared, on
inputs for every tower, at every output.
"""

import json
from pathlib import Path

import pytest

from sweep.disk import check_type, load_all

TOLERANCE = 1e-6  # 2e-14 is measured; code that casts to float32 inside, which nothing lifts here, gives up to 1e-7

# type, or type:head, and how the source is stored. Renamed, split and merged keys come with the types.
LONG = pytest.mark.long
TEXT = (
    "gpt2 gpt2:GPT2ForSequenceClassification:sharded gpt2:GPT2DoubleHeadsModel bert:BertForMaskedLM:legacy "
    "bert:BertForPreTraining bert:BertForTokenClassification bert:BertModel bert:BertForQuestionAnswering:legacy "
    "gpt_neox:GPTNeoXModel:sharded opt:OPTForSequenceClassification bloom deberta-v2 xlm-roberta:None:sharded roberta "
    "electra:None:merged"
)
EXPERTS = (
    "mixtral phimoe:None:sharded qwen3_moe jetmoe jamba:None:merged gemma2 cohere mamba starcoder2 "
    "stablelm falcon:None:sharded llama olmo2 gptj codegen"
)
PAIRS = (
    "t5 t5:T5EncoderModel bart bart:BartForCausalLM:sharded bart:BartModel mbart whisper "
    "whisper:WhisperForAudioClassification whisper:WhisperModel:sharded layoutlm pegasus wav2vec2 hubert:None:sharded"
)
PICTURES = (
    "vit vit:ViTModel vit:ViTForMaskedImageModeling:merged siglip videomae segformer convnext swin:None:sharded clip "
    "blip dinov2 deit llava"
)


def _check(cases: str, folder: Path) -> dict[str, float]:
    """The error of each case; fails where one cannot be converted or loaded, or differs."""
    wrong, folders = {}, []
    for case in cases.split():
        model_type, head, form = (*case.split(":"), None, None)[:3]
        head = None if head == "None" else head
        place = folder / case.replace(":", "_")
        why = check_type(model_type, place, form or "published", head)
        if why is None:
            folders.append(place)
        else:
            wrong[case] = why
    found = load_all(folders, folder / "cache")
    assert len(found) == len(folders)
    wrong |= {name: said for name, said in found.items() if not said.get("error", 1.0) < TOLERANCE}
    assert not wrong
    return {name: said["error"] for name, said in found.items()}


@pytest.mark.parametrize(
    "cases",
    [TEXT, pytest.param(EXPERTS, marks=LONG), pytest.param(PAIRS, marks=LONG), pytest.param(PICTURES, marks=LONG)],
    ids=["text", "experts", "pairs", "pictures"],
)
def test_converted_folders_load_in_stock_transformers_and_agree(cases, tmp_path):
    errors = _check(cases, tmp_path)
    assert len(errors) == len(cases.split()) >= 10
    for name in errors:
        record = json.loads((tmp_path / name / "converted" / "normswap.json").read_text())
        assert record["plan"]["converted"] and record["report"]["mathematics"]["comparison"]["first_divergence"] is None
