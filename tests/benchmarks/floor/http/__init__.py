"""The copies from `wakecall.http`."""
