"""Data sets: reading, long-tailed selection, batches as pure functions of seed, stage, epoch and step."""
