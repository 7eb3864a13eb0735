"""The annotation files of the tasks: one module for each family of formats."""
