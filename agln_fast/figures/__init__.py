"""Figures: what a network sees and what it gets right, drawn with matplotlib."""
