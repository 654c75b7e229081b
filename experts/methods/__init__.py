"""Published systems, one a file: what an expert minimises, and what only that system uses."""
