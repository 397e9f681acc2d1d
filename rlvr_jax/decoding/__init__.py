"""Compiled decoding: sampling, one model, two models."""
