"""Shapes: a small corpus of coloured shapes, drawn on the spot, in the form of a real data set."""

from sharding.shapes.write import write_shapes

__all__ = ["write_shapes"]
