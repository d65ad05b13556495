"""Shapes: a small corpus of coloured shapes, drawn on the spot, in the form of a real data set."""
