"""Scorecards: text, few-shot tasks, recall, exits, noise and speed of a model in one record, and their comparison."""
