"""Published systems, one per file: the loss, and every piece that only this system uses."""
