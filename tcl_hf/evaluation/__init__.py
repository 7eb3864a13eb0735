"""Evaluators, one module each, and the metrics that they compute."""
