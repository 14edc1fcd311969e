"""Adapters: a LoRA adapter (PEFT) of the source becomes one of the converted checkpoint that does the same there."""
