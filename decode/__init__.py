"""The batch decoding program: `python -m decode`."""
