"""Apply: a plan runs on a live model, or on a stream of shards with a modelling file beside them."""
