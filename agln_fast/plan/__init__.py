"""Exact rewrites: each takes a network and returns a new one that computes the same function with less work.

`fold_batchnorm` keeps a network's own form; `fuse` applies every rewrite and returns a network for inference alone.
"""
