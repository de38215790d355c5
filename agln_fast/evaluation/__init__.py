"""How good a segmentation is: metrics over a dataset, and where two engines disagree."""
