"""A training run: its loop, its directory, its checkpoints, its log and its evaluation."""
