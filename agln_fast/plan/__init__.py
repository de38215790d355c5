"""Exact rewrites: each takes a network and returns a new one that computes the same function with less work."""
