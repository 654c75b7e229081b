"""One worker, without Ray: a batch from images to moved weights, and what it exchanges with the others."""
