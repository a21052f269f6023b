"""What a run writes and shows: its folder, checkpoints, metrics, and the display of its progress."""
