"""JPEG bytes to cropped 8-bit frames: DALI, or a pool of CPU processes."""
