"""The training program: `python -m train`, and `python -m train.sft`."""
