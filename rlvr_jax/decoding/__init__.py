"""Compiled decoding with one model (`generate.decode`) and with two (`selective.decode_selective`).

Nothing here knows a model class: a model arrives as a `generate.LanguageModel`, a bundle of pure functions.
"""
