"""Before a start: what would run where, what it costs, and whether every node is ready."""
