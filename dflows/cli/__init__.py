"""What the commands share: configuration, checkpoints, errors on one line, the summary."""
