"""Answers of a model, their scores, general ability."""
