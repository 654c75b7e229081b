"""Which images an epoch consists of: samplers by name, and the cycle algorithms they are built from."""
