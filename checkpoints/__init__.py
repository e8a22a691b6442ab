"""Trajectories of training checkpoints, stored bit for bit."""
