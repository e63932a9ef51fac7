"""Recurrences of linear-cost token mixers as pure functions: token loop, single step, and chunks."""
