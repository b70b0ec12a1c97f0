"""The loops, their counters, the optimizer step, and the life cycle of a run."""
