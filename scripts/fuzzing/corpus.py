"""The seeds: the smallest checkpoints of every form that is read, and two plans.

Made by `python -m fuzzing.corpus` in scripts/, and again when the source of GPT-2 in transformers changes, which the
plan of a moved norm is made for.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import normswap
from sweep.zoo import randomise

CORPUS = Path(__file__).parents[2] / "tests" / "corpus"


def make(corpus: Path) -> None:
    """Write the seeds into `corpus`; the inputs that once failed, in `found`, stay."""
    for folder in ("whole", "sharded", "pickled", "legacy", "converted", "moved", "plans"):
        shutil.rmtree(corpus / folder, ignore_errors=True)
        (corpus / folder).mkdir(parents=True)
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=16, vocab_size=24, bos_token_id=1, eos_token_id=2)
    model = randomise(GPT2LMHeadModel(config), 0)
    model.save_pretrained(corpus / "whole")
    model.save_pretrained(corpus / "sharded", max_shard_size="3KB")
    for name, options in (("pickled", {}), ("legacy", {"_use_new_zipfile_serialization": False})):
        shutil.copy(corpus / "whole" / "config.json", corpus / name)
        torch.save(model.state_dict(), corpus / name / "pytorch_model.bin", **options)
    for name, words in (("converted", {}), ("moved", {"placement": "post"})):
        (corpus / name).rmdir()
        normswap.convert(corpus / "whole", corpus / name, norm="rmsnorm", verify="none", **words)
    normswap.plan(corpus / "whole", norm="rmsnorm").save(corpus / "plans" / "kind.json")
    normswap.plan(corpus / "whole", placement="post").save(corpus / "plans" / "place.json")
    for left in (*corpus.rglob("generation_config.json"), *corpus.rglob("README.md"), *corpus.rglob("*.py")):
        left.unlink()


if __name__ == "__main__":
    make(CORPUS)
