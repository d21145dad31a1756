"""Scores: bits per byte, likelihoods, tasks, what counting reaches."""
