"""The memory plan of a run: what each role takes on each device, and the largest sum over the run's phases."""
