"""Checkpoint -> bundle: the steps of a build, the choice of plans, acceptance, and building again."""
