"""Which samples an epoch shows in which order, and what of each sample."""
