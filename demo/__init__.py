"""The whole job, small: `python -m demo`."""
