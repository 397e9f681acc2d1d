"""Tests. `python -m pytest` from the root runs them; helpers are imported as `tests.name`."""
