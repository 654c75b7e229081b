"""Sets of runs that are compared: what they are, which is next, the processes that train them side by side."""
