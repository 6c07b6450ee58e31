"""Training of traffic models: cloning, closest-token fine-tuning, validation by driving, checkpoints."""
