"""The training loop, optimiser, schedule, checkpoints and metrics: knows modules and batches, no modality."""
