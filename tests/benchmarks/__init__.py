"""Measurements: each figure is a ratio to a floor taken in the same run, for these machines are noisy. `just bench`."""
