"""The paper's recipe: what to train on, how, and the loop that does it."""
