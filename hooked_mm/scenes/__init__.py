"""Scenes: endless small pictures whose truth is known, with captions, questions and contrast pairs.

`world` says what a scene is and what is held out, `draw` paints it, `captions` and `questions` talk about it, `pairs`
changes one attribute, `dataset` hands it out as samples. `docs/scenes.md` documents the data set.
"""
