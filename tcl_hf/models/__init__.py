"""The models and their processor: all that travels to the Hub with a checkpoint, and nothing else."""
