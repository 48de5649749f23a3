"""Training around the tasks: checkpoints, interruption, curves, what the screen shows."""
