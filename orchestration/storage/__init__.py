"""What a run keeps: its folder, checkpoints, journal and exports, on a disk or at a URL."""
