"""Which samples an epoch shows in which order, and the frames, crop, flip and caption of each."""
