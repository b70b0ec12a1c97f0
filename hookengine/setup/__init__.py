"""The arguments of a Runner, its state, its description, and migration from MMEngine."""
