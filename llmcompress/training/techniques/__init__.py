"""Techniques: one file each, with its paper and its equation, its options and what it does; a row each in TRAININGS."""
