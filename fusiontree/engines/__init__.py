"""What executes a training step: sharding, reduction, clipping, optimizer."""
