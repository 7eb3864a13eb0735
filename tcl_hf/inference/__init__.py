"""Use of trained models: pipelines, grounding, export."""
