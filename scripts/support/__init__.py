"""What the training scripts share: command line, checkpoints, data, models, metrics."""
