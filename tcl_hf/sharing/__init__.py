"""Sharing of models: the Hub, model cards, and conversion of checkpoints of the original code."""
