"""Training: set-up, one step, the loop, and the folder of a run."""
