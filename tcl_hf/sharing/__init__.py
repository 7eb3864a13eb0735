"""Checkpoints that come and go: the Hub, model cards, conversion of foreign checkpoints."""
