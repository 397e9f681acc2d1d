"""Arrays in, arrays out: log-probabilities, advantages, re-weightings, masks, policy losses and their reduction.

What has a choice is a table of names: `REWEIGHTINGS`, `TOKEN_MASKS`, `LOSSES`, `AGGREGATIONS`, `IMPORTANCE_WEIGHTS`.
"""
