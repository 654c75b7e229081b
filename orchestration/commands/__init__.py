"""What each `expertail` command does."""
