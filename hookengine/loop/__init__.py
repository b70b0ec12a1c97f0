"""What happens when: the loops, their counters, the optimizer's step, the life of a run."""
