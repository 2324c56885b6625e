"""Evaluation: images in the folders that evaluators read, and scores of them."""
