"""The commands of `expertail`, one per file."""
