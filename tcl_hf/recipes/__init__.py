"""Recipes: YAML files of arguments, the parts that they describe, the table of tasks, and reports."""
