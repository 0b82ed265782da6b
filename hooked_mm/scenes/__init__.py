"""Scenes: endless small pictures whose truth is known, with captions and questions.

`world` says what a scene is, `draw` paints it, `language` talks about it, `dataset` hands it out as samples.
"""
