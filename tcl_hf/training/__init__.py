"""The training loop and what surrounds it: arguments, engine, loaders, log, checkpoints, health, planning."""
