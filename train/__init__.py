"""Training on DeepSpeed: configuration, engine, loop, checkpoints, tracking."""
