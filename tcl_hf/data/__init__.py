"""From sources to batches: records, their order, views and collators."""
