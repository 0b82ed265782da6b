"""Concept dictionaries: decompositions Z ~ A C of representations, their grounding and their scores."""
