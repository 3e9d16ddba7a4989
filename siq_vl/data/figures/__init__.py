"""Figures: a drawn data set with exact ground truth in three domains (scenes, charts, documents)."""
