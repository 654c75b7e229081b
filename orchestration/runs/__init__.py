"""The driver of a run, from its first stage to its last, through the loss of workers."""
