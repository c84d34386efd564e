"""What is trained: model, data, loss, optimizer, checkpoints, evaluation and the run's records."""
