"""What `scripts/coverage.py` and the tests use to go through all model types of transformers.

`zoo` builds a small random model of a type (`shrink`, and `zoo.json` for what cannot be derived), `examine` inspects,
converts and measures it (`audit` checks the inspection, `disk` and `load_stock` do the same from folder to folder),
`workers` runs many in processes, and `table` makes one table of what they found.
"""
