"""Analyses of a hooked vision-language model: geometry, lenses, attention, attribution, causality."""
