"""What a run leaves on the disk: checkpoints, metrics, its folder and its progress."""
