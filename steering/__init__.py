"""Steering: vectors, their application during generation, and an evaluation one can trust."""
